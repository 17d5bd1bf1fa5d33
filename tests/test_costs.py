"""The counted FLOPs and bytes against torch's own counter over the package's calls."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, Qwen2Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import _counts as counts  # noqa: E402
import _other_paths as other_paths  # noqa: E402
import _page  # noqa: E402
import _paths as paths  # noqa: E402
import hot_paths  # noqa: E402
import on_paper  # noqa: E402
import scaling  # noqa: E402
from _counts import Cost, Counted, Sizes  # noqa: E402

from recbole_llm.decoding.beam_search import BeamSearch  # noqa: E402
from recbole_llm.decoding.full_ranking import FullRanking  # noqa: E402
from recbole_llm.decoding.head import Head, decoder_of  # noqa: E402
from recbole_llm.decoding.shared_cache import SharedPrompts  # noqa: E402

ROWS, PROMPT, BEAMS = 2, 13, 5


@pytest.fixture(scope="module", params=[4, 2], ids=["own keys", "shared keys"])
def model(request: pytest.FixtureRequest) -> Any:
    config = LlamaConfig(
        vocab_size=2_100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=request.param,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


@pytest.fixture(autouse=True)
def plain_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    # What runs on oneDNN's own tensors torch's counter does not see.
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)


def flops_of(call: Any) -> float:
    """By torch, with attention made of multiplications that it counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def read(model: Any) -> SharedPrompts:
    with torch.no_grad():
        ids = torch.randint(3, 100, (ROWS, PROMPT))
        return SharedPrompts(decoder_of(model), ids, torch.full((ROWS,), PROMPT), 4 * BEAMS)


class TestDecoding:
    def test_prompts(self, model: Any) -> None:
        expected = counts.prompts(Sizes.of(model.config), ROWS, PROMPT)
        assert flops_of(lambda: read(model)) == expected.flops
        with Counted() as counted:
            read(model)
        assert counted.cost.flops == expected.flops
        # transformers hands shared keys to each head apart.
        if model.config.num_key_value_heads == 4:
            assert counted.moved == expected.moved

    def test_a_beam_step(self, model: Any) -> None:
        reader, tokens = read(model), torch.randint(3, 100, (ROWS, BEAMS))
        with torch.no_grad():
            reader.step(tokens, torch.zeros_like(tokens))
            found = flops_of(lambda: reader.step(tokens, torch.arange(BEAMS).expand(ROWS, -1)))
        assert found == counts.continued(Sizes.of(model.config), ROWS, BEAMS, PROMPT, 2).flops

    @pytest.mark.parametrize("normaliser", ["vocabulary", "level"])
    def test_a_search(self, model: Any, normaliser: str) -> None:
        words = 2_100 - 4 * 256
        made = paths.catalogue(400)
        search = BeamSearch(
            decoder_of(model), Head.of(model), made, beams=BEAMS, lm_ids=words + torch.arange(1024),
            normaliser=normaliser,
        )  # fmt: skip
        found = flops_of(lambda: search([[5] * PROMPT] * ROWS))
        sizes = Sizes.of(model.config)
        # The level's rows are multiplied apart from the rest of the vocabulary, in which they are again.
        width = 256 + (sizes.vocabulary if normaliser == "vocabulary" else 0)
        assert found == counts.beam_search(sizes, ROWS, PROMPT, BEAMS, 4, width).flops

    def test_a_full_ranking(self, model: Any) -> None:
        search = BeamSearch(
            decoder_of(model), Head.of(model), paths.catalogue(60), beams=BEAMS,
            lm_ids=2_100 - 1024 + torch.arange(1024), normaliser="level",
        )  # fmt: skip
        ranking = FullRanking(search, 1_000)
        sizes = Sizes.of(model.config)
        expected = counts.full_ranking(sizes, PROMPT, ranking.reads, 1_000, 4, 256)
        assert flops_of(lambda: ranking([[5] * PROMPT])) == expected.flops
        # In pieces the paths of the shallow ones are shorter, and the last one is not full.
        split = FullRanking(search, 40)
        found = flops_of(lambda: split([[5] * PROMPT]))
        assert found == pytest.approx(counts.full_ranking(sizes, PROMPT, split.reads, 40, 4, 256).flops, rel=0.01)

    def test_generate_reads_the_prompt_for_each_beam(self, model: Any) -> None:
        ids = torch.randint(3, 100, (ROWS, PROMPT))
        found = flops_of(
            lambda: model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=BEAMS, do_sample=False, max_new_tokens=3,
                min_new_tokens=3, pad_token_id=0,
            )
        )  # fmt: skip
        assert found == counts.generated(Sizes.of(model.config), ROWS, PROMPT, BEAMS, 3).flops


class TestTraining:
    @pytest.mark.parametrize("adapter", ["full", "lora"])
    @pytest.mark.parametrize("kind", ["shared openings", "packed user"])
    def test_a_step(self, adapter: str, kind: str) -> None:
        torch.manual_seed(0)
        batch = paths.fine_tuning_batch(6, 4, 300) if kind == "shared openings" else paths.packed_batch(40, 300)
        read = batch.read()
        assert read.tokens < batch.lengths.sum()
        # More than one chunk of queries attends.
        assert (read.side > (read.chunk or read.side)) == (kind == "packed user")
        step = paths.FineTuning(paths.llama(2, 64, 300), batch, adapter)
        assert step.reader.packs
        assert flops_of(lambda: step.loss().backward()) == step.cost.flops

    def test_a_step_row_by_row(self) -> None:
        batch = paths.fine_tuning_batch(4, 3, 300)
        model = paths.llama(2, 64, 1_324).requires_grad_(True)

        def plain() -> None:
            logits = model(input_ids=batch.ids, use_cache=False).logits
            logits.logsumexp(-1).sum().backward()

        sizes = Sizes.of(model.config)
        unextended = counts.replace(sizes, vocabulary=300)
        assert flops_of(plain) == on_paper.plain_training(unextended, batch, None).flops

    def test_the_batch_is_about_the_benchmarks_own(self) -> None:
        # What docs/results/speed.md has of fine_tuning.py: 96 positions a sample, 27 of them in the tree.
        batch = paths.fine_tuning_batch(8)
        assert float(batch.lengths.float().mean()) == pytest.approx(96, abs=1)
        assert batch.read().tokens / 8 == pytest.approx(27, abs=1)

    def test_the_pass_forward(self) -> None:
        step = paths.FineTuning(paths.llama(2, 64, 300), paths.fine_tuning_batch(4, 3, 300))
        assert flops_of(step.loss) == step.forward.flops
        with Counted() as counted:
            step.loss()
        assert counted.cost == step.forward

    def test_the_optimizer_moves_what_it_is_counted_to_move(self) -> None:
        weights = [torch.nn.Parameter(torch.ones(7, 3)), torch.nn.Parameter(torch.ones(4))]
        optimizer = torch.optim.AdamW(weights, fused=True)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        held = [*weights, *(weight.grad for weight in weights)]
        held += [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
        read_ = sum(one.numel() * one.element_size() for one in held)
        written = read_ - sum(weight.grad.numel() * 4 for weight in weights)
        assert counts.optimizer(25).moved == read_ + written


class TestOthers:
    def test_a_step_of_glta(self) -> None:
        path = other_paths.glta(3)
        assert flops_of(path.call) == path.cost.flops

    def test_what_counts_sasrec_counts_as_torch_does(self) -> None:
        path = other_paths.sasrec(4, 50, length=10)
        with sdpa_kernel(SDPBackend.MATH), Counted() as counted:
            path.call()
        assert counted.flops == flops_of(path.call)
        # The kernel of attention makes its scores again in the pass backward, which is one product more to its six.
        seen = path.cost.flops - counted.flops
        assert 0 < seen < counted.flops / 10

    def test_an_evaluation(self) -> None:
        path = other_paths.evaluator(300, 70)
        assert flops_of(path.call) == path.cost.flops

    def test_the_graph_convolution_passes_each_edge_once_a_layer_and_direction(self) -> None:
        paths_ = [other_paths.lightgcn(30, 20, 100, width=8, layers=layers) for layers in (1, 2)]
        edges = int(paths_[0].name.split()[-2])
        assert [path.cost.flops for path in paths_] == [2 * 2 * layers * edges * 8 for layers in (1, 2)]
        assert edges % 2 == 0 and edges <= 200

    def test_a_mask_is_written_once(self) -> None:
        path = other_paths.mask(500)
        written = path.call()
        assert path.cost == Cost(0, written.numel() * written.element_size())


class TestSizes:
    def test_of_a_configuration(self) -> None:
        config = Qwen2Config(
            vocab_size=100, hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2,
        )  # fmt: skip
        sizes = Sizes.of(config)
        matrices = [one for one in AutoModel.from_config(config).layers.parameters() if one.dim() == 2]
        assert sizes.weights == sum(one.numel() for one in matrices)

    def test_of_published_models(self) -> None:
        # 6.74e9 parameters with two tables of embeddings, and "1.31B" without any, as their cards have them.
        llama, qwen = counts.LLAMA_2_7B, counts.QWEN_2_5_1_5B
        assert round((llama.weights + 2 * llama.vocabulary * llama.width) / 1e9, 2) == 6.74
        assert round(qwen.weights / 1e9, 2) == 1.31


class TestRoofline:
    def test_the_longer_of_two(self) -> None:
        cost = Cost(100.0, 10.0)
        assert cost.seconds(10.0, 10.0) == 10.0 and cost.seconds(1e9, 1.0) == 10.0
        assert (cost + cost) * 2 == Cost(400.0, 40.0)

    def test_an_exponent_is_the_power(self) -> None:
        sizes = [10, 100, 1_000]
        assert scaling.exponent(sizes, [3 * size**1.5 for size in sizes]) == pytest.approx(1.5)

    def test_a_step_on_paper_turns_from_bytes_to_flops(self) -> None:
        sizes = counts.LLAMA_2_7B
        turn = on_paper.PEAK / on_paper.BANDWIDTH
        few, many = (counts.continued(sizes, 1, tokens, 1, 1) for tokens in (turn / 2, 4 * turn))
        assert few.moved / few.flops > 1 / turn > many.moved / many.flops


class TestPage:
    def test_a_table_takes_the_place_of_its_name(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("a\n<!-- one -->\nold\n<!-- end of one -->\nb\n")
        _page.show("one", _page.markdown(["", "x"], [["row", "1"]]), page)
        assert page.read_text() == "a\n<!-- one -->\n|  | x |\n|---|---:|\n| row | 1 |\n<!-- end of one -->\nb\n"
        with pytest.raises(SystemExit, match="no place for 'two'"):
            _page.show("two", ["x"], page)

    def test_what_is_on_paper_is_in_the_page(self) -> None:
        text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
        for lines in (
            on_paper.before_and_after(),
            on_paper.seven_billion(),
            on_paper.memory(),
            on_paper.shares(),
            on_paper.targets(),
        ):
            assert "\n".join(lines) in text

    def test_measured_tables_are_in_the_page(self) -> None:
        # Each script finds a place for its tables.
        text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
        names = ["ceilings", "hot paths", *(f"growth with {name}" for name in scaling.TABLES)]
        for name in names:
            table = text.partition(f"<!-- {name} -->\n")[2].partition(f"<!-- end of {name} -->")[0].splitlines()
            assert len(table) > 2 and len({line.count("|") for line in table}) == 1
        assert f"| {' | '.join(hot_paths.HEADS)} |" in text

    def test_measured_ratios_are_those_of_the_page_of_speed(self) -> None:
        ratios = {name: on_paper.measured_ratio(name) for name in on_paper.pairs(on_paper.SEARCHED, on_paper.TRAINED)}
        text = on_paper.SPEED.read_text(encoding="utf-8")
        for name, ratio in ratios.items():
            line = next((line for line in text.splitlines() if line.startswith(f"| {name.split(',')[0]}")), "")
            assert ratio in line and bool(ratio) == bool(line)
        assert len({ratio for name, ratio in ratios.items() if "beam_search" in name}) == 2

    def test_figures_have_three_digits(self) -> None:
        assert [_page.figure(value) for value in (0, 0.01234, 12.34, 1234.5)] == ["–", "0.0123", "12.3", "1,234"]
        assert math.isclose(float(_page.figure(99.96)), 100.0)
