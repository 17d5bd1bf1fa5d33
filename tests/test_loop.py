"""The training loop: today's numbers at default settings, and each setting against the plain torch way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from test_glta import generator, model
from tiny_lm import gpt2, llama

from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.errors import UserError
from recbole_llm.schema import properties_dir, read_yaml
from recbole_llm.training.loop import TrainingLoop, check_settings

STAGES = ("item_text_alignment", "user_item_alignment")
RATE = 0.01


def config(**settings: Any) -> dict[str, Any]:
    shipped = dict(read_yaml(properties_dir() / "training.yaml"))
    base = {"device": torch.device("cpu"), "seed": 1, "enable_amp": False, "enable_scaler": False, "model": "GLTA"}
    return shipped | base | settings


def loop_of(made: Any, stage: str, epochs: int = 3, **settings: Any) -> tuple[TrainingLoop, torch.optim.Optimizer]:
    optimizer = torch.optim.Adam(made.begin_stage(stage), lr=RATE)
    batches = len(made.stage_batches(stage, generator()))
    return TrainingLoop(config(**settings), made, stage, optimizer, batches, epochs), optimizer


def no_check(_loss: torch.Tensor) -> None:
    pass


def trained(made: Any, stage: str, epochs: int = 3, **settings: Any) -> list[float]:
    loop, _ = loop_of(made, stage, epochs, **settings)
    source = generator(5)
    return [loss for _ in range(epochs) for loss in loop.epoch(made.stage_batches(stage, source), no_check)]


def weights(made: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_default_settings_give_a_plain_loops_numbers_to_the_bit(stage: str) -> None:
    ours, plain = model(history_dropout=0.3, gllm_dropout=0.2), model(history_dropout=0.3, gllm_dropout=0.2)
    torch.manual_seed(4)
    losses = trained(ours, stage)

    torch.manual_seed(4)
    optimizer = torch.optim.Adam(plain.begin_stage(stage), lr=RATE)
    source, expected = generator(5), []
    for _ in range(3):
        plain.train()
        for batch in plain.stage_batches(stage, source):
            loss = plain.stage_loss(stage, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
    assert losses == expected and len(losses) >= 6
    for name, value in weights(ours).items():
        assert torch.equal(value, plain.state_dict()[name]), name


def test_accumulated_batches_are_one_batch() -> None:
    """Batches of unlike numbers of targets weigh by their targets, also in an epoch's shorter last step."""
    apart, whole = model(), model()
    stage = STAGES[1]
    loop, _ = loop_of(apart, stage, gradient_accumulation_steps=2)
    batches = list(apart.stage_batches(stage, generator(5)))
    counts = [batch.targets_count() for batch in batches]
    assert len(batches) % 2 == 1 and len(set(counts)) > 1
    losses = list(loop.epoch(batches, no_check))

    optimizer = torch.optim.Adam(whole.begin_stage(stage), lr=RATE)
    expected = []
    for start in range(0, len(batches), 2):
        parts = batches[start : start + 2]
        total = sum(part.targets_count() for part in parts)
        loss = sum(whole.stage_loss(stage, part) * part.targets_count() for part in parts) / total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-6)
    for name, value in weights(apart).items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_the_shares_of_the_processes_make_up_the_batch(count: int) -> None:
    made = model()
    made.begin_stage(STAGES[1])
    batch = next(iter(made.stage_batches(STAGES[1], generator(5))))
    shares = [batch.share(rank, count) for rank in range(count)]
    assert sum(len(share.ids) for share in shares) == len(batch.ids)
    assert sum(share.targets_count() for share in shares) == batch.targets_count()
    whole = made.stage_loss(STAGES[1], batch)
    parts = [made.stage_loss(STAGES[1], share) * share.targets_count() / batch.targets_count() for share in shares]
    torch.testing.assert_close(sum(parts), whole, atol=1e-6, rtol=0.0)


@pytest.mark.parametrize("setting", [0.05, {"max_norm": 0.05, "norm_type": 1}])
def test_gradients_are_clipped_to_the_norm(setting: Any) -> None:
    made = model()
    loop, _ = loop_of(made, STAGES[0], clip_grad_norm=setting)
    kind = setting["norm_type"] if isinstance(setting, dict) else 2
    norms: list[float] = []

    def norm() -> float:
        return float(torch.stack([p.grad.norm(kind) for p in loop.parameters if p.grad is not None]).norm(kind))

    for _ in loop.epoch(made.stage_batches(STAGES[0], generator()), lambda _loss: norms.append(norm())):
        assert norms[-1] > 0.05 and norm() == pytest.approx(0.05, rel=1e-3)
    assert norms


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_schedules_rise_and_end_at_the_last_step(name: str) -> None:
    made = model()
    epochs = 5
    loop, optimizer = loop_of(made, STAGES[1], epochs, lr_schedule=name, warmup_ratio=0.2)
    rates = [0.0]
    for _ in range(epochs):
        for _ in loop.epoch(made.stage_batches(STAGES[1], generator()), no_check):
            rates.append(optimizer.param_groups[0]["lr"])
    peak = round(0.2 * loop.step_count)
    assert rates[peak] == pytest.approx(RATE) and rates[: peak + 1] == sorted(rates[: peak + 1])
    tail = rates[peak:]
    if name == "constant":
        assert tail == pytest.approx([RATE] * len(tail))
    else:
        assert tail == sorted(tail, reverse=True) and tail[-1] == pytest.approx(0.0, abs=1e-9)
        middle = {"linear": RATE / 2, "cosine": RATE / 2}[name]
        assert tail[len(tail) // 2] == pytest.approx(middle, rel=0.4)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_past_its_end_a_schedule_stays_there(name: str) -> None:
    made = model()
    loop, optimizer = loop_of(made, STAGES[1], 2, lr_schedule=name, warmup_ratio=0.0)
    rates = []
    for _ in range(4):
        for _ in loop.epoch(made.stage_batches(STAGES[1], generator()), no_check):
            rates.append(optimizer.param_groups[0]["lr"])
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-9 < rates[0]


def test_a_loop_goes_on_where_its_state_says() -> None:
    """Weights, optimizer, schedule and step count of an interrupted run carry on to the bit."""
    settings = {"lr_schedule": "cosine", "warmup_ratio": 0.3, "gradient_accumulation_steps": 2, "clip_grad_norm": 1.0}
    stage = STAGES[1]
    straight = model()
    whole = trained(straight, stage, 4, **settings)

    first = model()
    loop, optimizer = loop_of(first, stage, 4, **settings)
    source = generator(5)
    half = [loss for _ in range(2) for loss in loop.epoch(first.stage_batches(stage, source), no_check)]
    position = source.get_state()
    state = loop.state_dict(), optimizer.state_dict(), weights(first)

    second = model()
    loop, optimizer = loop_of(second, stage, 4, **settings)
    second.load_state_dict(state[2])
    optimizer.load_state_dict(state[1])
    loop.load_state_dict(state[0])
    source = generator()
    source.set_state(position)
    rest = [loss for _ in range(2) for loss in loop.epoch(second.stage_batches(stage, source), no_check)]
    assert half + rest == whole
    for name, value in weights(second).items():
        assert torch.equal(value, straight.state_dict()[name]), name


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("stage", STAGES)
def test_checkpointed_layers_give_the_same_gradients_and_keep_less(stage: str, make: Any) -> None:
    """The prompts' shared opening is lent to the layers as a cache; dropout of the frozen model stays off."""
    found = []
    for checkpointed in (False, True):
        decoder = make()
        if checkpointed:
            checkpoint_layers(decoder)
            checkpoint_layers(decoder)
        made = model(decoder)
        parameters = made.begin_stage(stage)
        batch = next(iter(made.stage_batches(stage, generator(5))))
        kept = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = made.stage_loss(stage, batch)
        loss.backward()
        assert not decoder.training
        found.append((loss, [parameter.grad for parameter in parameters], kept))
    (loss, gradients, kept), (other, others, kept_less) = found
    assert torch.equal(loss, other) and kept_less < kept
    for gradient, again in zip(gradients, others, strict=True):
        assert torch.equal(gradient, again)


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(UserError, match=r"gradient_checkpointing: .*Sequential"):
        checkpoint_layers(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_bf16_trains_near_float32_and_ranks_in_float32() -> None:
    exact, mixed = model(), model()
    full, half = trained(exact, STAGES[1]), trained(mixed, STAGES[1], mixed_precision="bf16")
    assert full != half and half == pytest.approx(full, rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in mixed.parameters())
    # What training left behind in bfloat16 (the prompts' opening) must not be what a ranking reads.
    fresh = model()
    fresh.load_state_dict(mixed.state_dict())
    batch = next(iter(mixed.stage_batches(STAGES[1], generator())))
    with torch.no_grad():
        assert torch.equal(mixed.stage_loss(STAGES[1], batch), fresh.stage_loss(STAGES[1], batch))


def test_two_runs_of_one_process_may_differ_in_precision() -> None:
    for precision in ("bf16", "no", "bf16"):
        assert loop_of(model(), STAGES[0], mixed_precision=precision)[0].accelerator.mixed_precision == precision


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mixed_precision": "fp16"}, "fp16 needs a GPU"),
        ({"enable_amp": True}, "enable_amp is for RecBole's own models; GLTA reads mixed_precision"),
        ({"clip_grad_norm": {"max_norm": -1}}, "clip_grad_norm should be a number or"),
        ({"clip_grad_norm": {"norm": 1.0}}, "clip_grad_norm should be a number or"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_settings(config(**settings))


def test_a_precision_that_accelerate_was_told_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(UserError, match="add --mixed_precision=bf16"):
        check_settings(config())
    check_settings(config(mixed_precision="bf16"))


def test_nothing_is_stepped_after_a_check_that_raises() -> None:
    made = model()
    loop, _ = loop_of(made, STAGES[0])
    before = weights(made)

    def refuse(_loss: torch.Tensor) -> None:
        raise UserError("stop")

    with pytest.raises(UserError, match="stop"):
        next(itertools.chain(loop.epoch(made.stage_batches(STAGES[0], generator()), refuse)))
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
