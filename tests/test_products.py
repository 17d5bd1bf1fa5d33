"""Products by OpenBLAS in torch's place: values and gradients, what is left to torch, and who decides."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_lm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from recbole_llm import products
from recbole_llm.config import Config
from recbole_llm.errors import UserError

SIZES = st.integers(0, 40)


@pytest.fixture
def openblas() -> Iterator[None]:
    """OpenBLAS with its kernels of whatever width: what it computes is the same."""
    lacking = products._lacking()
    if lacking:
        pytest.skip(f"there is nothing to test: it takes {lacking}")
    products.use("openblas")
    yield
    products.use("torch")


@pytest.fixture
def everything(openblas: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small."""
    for name in ("LEAST_ROWS", "LEAST_SIDE", "LEAST_WORK"):
        monkeypatch.setattr(products, name, 0)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """The sizes of what OpenBLAS has multiplied."""
    seen: list[tuple[int, int, int]] = []
    dot = np.dot

    def spy(left: Any, right: Any, out: Any = None) -> Any:
        seen.append((*left.shape, right.shape[1]))
        return dot(left, right, out=out)

    monkeypatch.setattr(products.np, "dot", spy)
    return seen


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(matrix: Tensor, how: str) -> Tensor:
    """The same numbers, otherwise in memory."""
    if how == "transposed":
        return matrix.t().contiguous().t()
    if how == "every other":
        return matrix.repeat_interleave(2, 1)[:, ::2]
    if how == "part of wider":
        return F.pad(matrix, (3, 2))[:, 3 : 3 + matrix.shape[1]]
    return matrix


LAYOUTS = st.sampled_from(["plain", "transposed", "every other", "part of wider"])


class TestProducts:
    @settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(rows=SIZES, inner=SIZES, columns=SIZES, left=LAYOUTS, right=LAYOUTS)
    def test_any_matrices(self, everything: None, rows: int, inner: int, columns: int, left: str, right: str) -> None:
        one, two = laid_out(drawn(rows, inner), left), laid_out(drawn(inner, columns, seed=1), right)
        found = one @ two
        assert found.is_contiguous()
        torch.testing.assert_close(found, (one.double() @ two.double()).float(), rtol=1e-5, atol=1e-5)
        added = drawn(columns, seed=2)
        torch.testing.assert_close(torch.addmm(added, one, two), found + added, rtol=1e-5, atol=1e-5)

    @settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(lead=st.lists(st.integers(0, 5), max_size=3), inner=st.integers(1, 30), columns=SIZES, bias=st.booleans())
    def test_a_linear_layer_and_its_gradients(
        self, everything: None, lead: list[int], inner: int, columns: int, bias: bool
    ) -> None:
        given = [drawn(*lead, inner), drawn(columns, inner, seed=1), *([drawn(columns, seed=2)] if bias else [])]
        weights = drawn(*lead, columns, seed=3)

        def passes(dtype: torch.dtype) -> list[Tensor]:
            own = [tensor.to(dtype).requires_grad_() for tensor in given]
            made = F.linear(*own)
            return [made, *torch.autograd.grad((made * weights.to(dtype)).sum(), own)]

        for found, wanted in zip(passes(torch.float32), passes(torch.float64), strict=True):
            torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)

    def test_twice_differentiable(self, everything: None, asked: list[Any]) -> None:
        one, two = drawn(6, 5).requires_grad_(), drawn(5, 4, seed=1).requires_grad_()
        (first,) = torch.autograd.grad((one @ two).square().sum(), one, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), two)
        # d/dW |2 x W W'|^2
        x, w = one.detach().double(), two.detach().double().requires_grad_()
        (wanted,) = torch.autograd.grad((2 * x @ w @ w.t()).square().sum(), w)
        torch.testing.assert_close(second.double(), wanted, rtol=1e-5, atol=1e-4)
        assert len(asked) >= 4

    def test_an_added_matrix_factors_and_a_place_of_its_own(self, everything: None) -> None:
        one, two, added = drawn(7, 5), drawn(5, 3, seed=1), drawn(7, 3, seed=2)
        torch.testing.assert_close(torch.addmm(added, one, two), added + one @ two)
        torch.testing.assert_close(torch.addmm(added, one, two, beta=0.5, alpha=2), 0.5 * added + 2 * (one @ two))
        torch.testing.assert_close(torch.addmm(drawn(1, 3), one, two), drawn(1, 3) + one @ two)
        torch.testing.assert_close(torch.mm(one, two, out=torch.empty(7, 3)), one @ two)

    def test_a_mistake_is_told_in_torchs_words(self, everything: None) -> None:
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            drawn(4, 5) @ drawn(4, 5)
        with pytest.raises(RuntimeError, match="same dtype"):
            drawn(4, 5) @ drawn(5, 4).double()

    def test_numbers_out_of_range_are_no_warning(self, everything: None, recwarn: Any) -> None:
        found = torch.full((4, 4), torch.inf) @ torch.zeros(4, 4)
        assert found.isnan().all() and not recwarn.list

    def test_without_gradients_and_over_a_batch_of_functions(self, everything: None, asked: list[Any]) -> None:
        one, two = drawn(6, 5), drawn(5, 4, seed=1)
        with torch.inference_mode():
            torch.testing.assert_close(one @ two, (one.double() @ two.double()).float())
        many = torch.vmap(lambda row: row @ two)(one.view(2, 3, 5))
        torch.testing.assert_close(many.view(6, 4), (one.double() @ two.double()).float())
        assert asked

    def test_again_the_same_bits(self, openblas: None) -> None:
        one, two = drawn(100, 200), drawn(200, 300, seed=1)
        assert torch.equal(one @ two, one.clone() @ two.clone())


class TestWhatIsLeftToTorch:
    def test_small_ones(self, openblas: None, asked: list[Any]) -> None:
        for rows, inner, columns in ((1, 4000, 4000), (47, 256, 256), (400, 4, 400), (400, 400, 4), (50, 50, 50)):
            drawn(rows, inner) @ drawn(inner, columns)
        assert not asked
        drawn(64, 128) @ drawn(128, 128)
        assert asked == [(64, 128, 128)]

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
    def test_other_numbers(self, everything: None, asked: list[Any], dtype: torch.dtype) -> None:
        assert ((drawn(64, 64) * 9).to(dtype) @ (drawn(64, 64) * 9).to(dtype)).dtype == dtype and not asked

    def test_autocast(self, everything: None, asked: list[Any]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            assert F.linear(drawn(64, 64), drawn(64, 64)).dtype == torch.bfloat16
        assert not asked

    def test_all_once_it_is_asked_back(self, openblas: None, asked: list[Any]) -> None:
        one, two = drawn(100, 200), drawn(200, 300, seed=1)
        one @ two
        products.use("torch")
        own = one @ two
        assert len(asked) == 1 and products.in_use() == "torch"
        products.use("torch")
        products.use("openblas")
        products.use("openblas")
        torch.testing.assert_close(one @ two, own, rtol=1e-5, atol=1e-4)
        assert len(asked) == 2

    def test_a_frozen_weight_has_no_gradient_to_multiply(self, everything: None, asked: list[Any]) -> None:
        states = drawn(8, 6).requires_grad_()
        F.linear(states, drawn(5, 6)).sum().backward()
        assert asked == [(8, 6, 5), (8, 5, 6)]

    def test_who_counts_sees_what_there_is(self, everything: None) -> None:
        class Names(TorchDispatchMode):
            seen: list[str] = []

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                self.seen.append(func._overloadpacket.__name__)
                return func(*args, **(kwargs or {}))

        with FlopCounterMode(display=False) as counter, Names() as names:
            drawn(8, 6) @ drawn(6, 5)
        assert counter.get_total_flops() == 2 * 8 * 6 * 5
        assert names.seen.count("mm") == 1 and not {"detach", "new_empty"} & set(names.seen)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "lora"])
def test_a_language_model(everything: None, asked: list[Any], kind: str) -> None:
    model: Any = tiny_lm.gpt2() if kind == "gpt2" else tiny_lm.llama()
    if kind == "lora":
        inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False), model)
    else:
        model.requires_grad_(True)
    names = list(model.state_dict())
    ids = torch.arange(60).view(2, 30)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}

    def passes() -> list[Tensor]:
        states = model(input_ids=ids, use_cache=False).last_hidden_state
        # Not their squares, which the last norm settles.
        loss = (states * drawn(*states.shape)).sum()
        return [states.detach(), *torch.autograd.grad(loss, list(trained.values()))]

    found = passes()
    count = len(asked)
    products.use("torch")
    wanted = passes()
    assert count > 20 and len(asked) == count and list(model.state_dict()) == names
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5 * float(two.abs().max()))


class TestWhoDecides:
    @pytest.fixture
    def here(self, openblas: None, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
        """Where it gains."""
        monkeypatch.setattr(products, "_held_back", lambda: True)
        monkeypatch.setattr(products, "kernels", lambda: "SkylakeX")
        products.use("torch")
        return monkeypatch

    def test_auto_takes_it_where_it_gains(self, here: pytest.MonkeyPatch) -> None:
        assert torch.get_num_threads() == 1
        products.use("auto")
        assert products.in_use() == "openblas"
        here.setattr(torch, "get_num_threads", lambda: 2)
        products.use("auto")
        assert products.in_use() == "torch"

    @pytest.mark.parametrize(
        ("name", "value"), [("_held_back", lambda: False), ("kernels", lambda: "Haswell"), ("kernels", lambda: "")]
    )
    def test_and_only_there(self, here: pytest.MonkeyPatch, name: str, value: Any) -> None:
        here.setattr(products, name, value)
        products.use("auto")
        assert products.in_use() == "torch"

    def test_an_older_torch_is_left_alone(self, here: pytest.MonkeyPatch) -> None:
        here.delattr(torch.library, "get_kernel")
        products.use("auto")
        assert products.in_use() == "torch"
        with pytest.raises(UserError, match=r"cpu_products: openblas needs a torch .*, not "):
            products.use("openblas")

    def test_whose_processor(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told = [("AuthenticAMD", 26, True), ("AuthenticAMD", 25, False), ("GenuineIntel", 26, False), (None, 0, False)]
        for vendor, family, answer in told:
            file = tmp_path / f"{vendor}-{family}"
            if vendor:
                one = f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: fpu avx512f\n"
                file.write_text(one + "\n" + one)
            monkeypatch.setattr(products, "CPUINFO", file)
            products._held_back.cache_clear()
            assert products._held_back() is answer
        products._held_back.cache_clear()

    def test_as_many_threads_as_torch_has(self, openblas: None) -> None:
        assert [library["num_threads"] for library in products._openblas().info()] == [torch.get_num_threads()]


class TestTheSetting:
    def made(self, **more: Any) -> Config:
        return Config("GLTA", "tiny", config_dict={"gpu_id": "", **more}, command_line=[])

    def test_it_is_settled_with_the_config_and_goes_to_the_parts(self, openblas: None) -> None:
        config = self.made(cpu_products="openblas")
        assert products.in_use() == "openblas"
        plain = self.made(cpu_products="torch")
        assert products.in_use() == "torch"
        assert config.part("graph_model")["cpu_products"] == "openblas"
        # What was trained with the one is found with the other.
        assert config.stage_keys() == plain.stage_keys()

    def test_what_is_not_there_is_refused_in_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(products, "kernels", lambda: "")
        with pytest.raises(
            UserError, match=r"^cpu_products: openblas needs a numpy .*cpu_products: torch needs nothing$"
        ):
            self.made(cpu_products="openblas")
        with pytest.raises(UserError, match="cpu_products"):
            self.made(cpu_products="onednn")
