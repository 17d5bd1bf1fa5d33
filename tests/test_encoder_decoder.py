"""Language models with an encoder: what they learn and find, against transformers' own T5."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_t5
import torch
from searches import (
    CODE_IDS,
    LM_SIZE,
    NORMALISERS,
    PROMPTS,
    SIZES,
    TITLES,
    assert_best_where_rows_are_left_out,
    random_codes,
    rivals,
)
from test_aligntokenrec import OPTIONS, SETTINGS, batch, shipped, tokens
from test_glta import N_ITEMS, dataset
from torch import nn
from torch.nn import functional as F
from transformers import T5ForConditionalGeneration

from recbole_llm.backbone.adapter import adapt, check_targets
from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.backbone.encoder_decoder import AnswerReader, base_of
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.text_projector import text_features
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.ties import tie_order
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.head import Head
from recbole_llm.decoding.level_search import LevelSearch
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import FINE_TUNING, AlignTokenRec
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL

IGNORED = -100


@pytest.fixture(scope="module", params=tiny_t5.KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_t5.model(request.param, LM_SIZE + sum(SIZES))


@pytest.fixture(scope="module")
def folders_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: tiny_t5.write(kind, tmp_path_factory.mktemp("t5")) for kind in tiny_t5.KINDS}


def searcher(model: Any, item_tokens: ItemTokens, kind: type[BeamSearch] = BeamSearch, **options: Any) -> BeamSearch:
    lm_ids = CODE_IDS if item_tokens.kind == "codes" else None
    return kind(base_of(model), Head.of(model), item_tokens, lm_ids=lm_ids, **options)


@torch.no_grad()
def exhaustive(model: Any, item_tokens: ItemTokens, prompt: list[int], normaliser: str) -> torch.Tensor:
    """Every item's score, float64 [n_items]: transformers' own forward pass with the item's tokens as labels."""
    lm_ids = CODE_IDS if item_tokens.lm_ids is None else item_tokens.lm_ids
    scores = torch.full((item_tokens.n_items,), -torch.inf, dtype=torch.float64)
    for item in range(item_tokens.n_items):
        own = item_tokens.of(item)
        if not own:
            continue
        labels = lm_ids[own].unsqueeze(0)
        logits = model(input_ids=torch.tensor([prompt]), labels=labels).logits[0].double()
        total = 0.0
        for depth, token in enumerate(own):
            among = rivals(item_tokens, own[:depth], normaliser, logits.shape[1])
            total += float(logits[depth, lm_ids[token]] - logits[depth, among].logsumexp(0))
        scores[item] = total
    return scores


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("kind", ["codes", "titles"])
def test_equals_exhaustive_scoring(model: Any, kind: str, normaliser: str) -> None:
    item_tokens = random_codes(12) if kind == "codes" else TITLES
    search = searcher(model, item_tokens, beams=item_tokens.n_items - 1, normaliser=normaliser)
    found = search(PROMPTS, leaked=True)
    assert search.shares_prompts
    for row, prompt in enumerate(PROMPTS):
        wanted = exhaustive(model, item_tokens, prompt, normaliser)
        expected = wanted.sort(descending=True)
        torch.testing.assert_close(found.scores[row].double(), expected.values[:-1], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(wanted[found.items[row]], expected.values[:-1], atol=1e-4, rtol=1e-5)
        assert found.items[row].unique().numel() == item_tokens.n_items - 1


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_rows_in_which_nothing_can_change_are_left_out(normaliser: str) -> None:
    model = tiny_t5.model(tiny_t5.KINDS[0], LM_SIZE)
    assert_best_where_rows_are_left_out(model, searcher, exhaustive, normaliser)


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_what_is_excluded_never_comes_out_and_equal_items_come_in_the_tie_order(model: Any, normaliser: str) -> None:
    rows = [[-1, -1, -1], [0, 0, 0], [1, 2, 4], [0, 0, 0], [1, 2, 4], [3, 1, 2], [0, 0, 0], [2, 1, 1]]
    item_tokens = ItemTokens.from_codes(rows, SIZES)
    order = tie_order(["[PAD]", "u", "v", "w", "x", "y", "z", "a"])
    rank = {item: place for place, item in enumerate(order.tolist())}
    search = searcher(model, item_tokens, beams=5, tie_order=order, normaliser=normaliser)
    barred = [[4, 5], [2, 1], [7, 0], [6, 3]]
    found = search(PROMPTS, exclude=Exclusion(search.trie, torch.tensor(barred)))
    for row, prompt in enumerate(PROMPTS):
        scores = exhaustive(model, item_tokens, prompt, normaliser)
        left = [item for item in range(1, 8) if item not in barred[row]]
        wanted = sorted(left, key=lambda item: (-round(float(scores[item]), 3), rank[item]))[:5]
        assert found.items[row].tolist() == wanted
        torch.testing.assert_close(found.scores[row].double(), scores[wanted], atol=1e-4, rtol=1e-5)


def test_few_beams_find_items_alone_and_alike_in_any_batch(model: Any) -> None:
    item_tokens = random_codes(40)
    search = searcher(model, item_tokens, beams=7)
    whole = search(PROMPTS)
    assert ((whole.items >= 1) & (whole.items <= 40)).all() and (whole.scores.diff(dim=1) <= 0).all()
    for row, prompt in enumerate(PROMPTS):
        alone = search([prompt])
        assert torch.equal(alone.items[0], whole.items[row]) and whole.items[row].unique().numel() == 7
        wanted = exhaustive(model, item_tokens, prompt, "vocabulary")
        torch.testing.assert_close(whole.scores[row].double(), wanted[whole.items[row]], atol=1e-4, rtol=1e-5)


def test_equals_generate_with_a_prefix_function(model: Any) -> None:
    item_tokens = random_codes(40)
    legal: dict[tuple[int, ...], set[int]] = {}
    for item in range(1, 41):
        ids = CODE_IDS[item_tokens.of(item)].tolist()
        for depth, token in enumerate(ids):
            legal.setdefault(tuple(ids[:depth]), set()).add(token)
    back = torch.full((LM_SIZE + sum(SIZES),), -1)
    back[CODE_IDS] = torch.arange(len(CODE_IDS))
    search = searcher(model, item_tokens, beams=6)
    for prompt in PROMPTS:
        out = model.generate(
            input_ids=torch.tensor([prompt]), num_beams=6, num_return_sequences=6, do_sample=False,
            max_new_tokens=len(SIZES), length_penalty=0.0, early_stopping=False, return_dict_in_generate=True,
            output_scores=True, eos_token_id=None,
            prefix_allowed_tokens_fn=lambda _, sentence: sorted(legal[tuple(sentence[1:].tolist())]),
        )  # fmt: skip
        found = search([prompt])
        torch.testing.assert_close(found.scores[0], out.sequences_scores, atol=1e-3, rtol=1e-3)
        assert found.items[0].tolist() == item_tokens.items_of(back[out.sequences[:, 1:]]).tolist()


def test_the_level_wise_search_has_the_same_scores(model: Any) -> None:
    item_tokens = random_codes(20)
    found = searcher(model, item_tokens, LevelSearch, beams=20)(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        wanted = exhaustive(model, item_tokens, prompt, "vocabulary")
        items, scores = found.items[row], found.scores[row]
        torch.testing.assert_close(scores[items > 0].double(), wanted[items[items > 0]], atol=1e-4, rtol=1e-5)


def test_half_precision_finds_items(folders_of: dict[str, Path]) -> None:
    for kind, folder in folders_of.items():
        options = {**OPTIONS, "dtype": "bfloat16"}
        backbone = load_backbone(folder, **options, with_head=True, causal_only=False)
        first = backbone.embed_tokens.num_embeddings - sum(SIZES)
        item_tokens = random_codes(20)
        search = BeamSearch(
            backbone.decoder, Head.of(backbone.causal), item_tokens, beams=5, lm_ids=first + torch.arange(sum(SIZES))
        )
        found = search(PROMPTS)
        assert found.scores.isfinite().all(), kind
        assert all(row.unique().numel() == 5 for row in found.items)


# --- what is learned -------------------------------------------------------------------------------------------------


def build(folder: Path, model_class: type[AlignTokenRec] = AlignTokenRec, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = model_class({**shipped(), **SETTINGS, "llm_dtype": "float32", **settings}, dataset())
    backbone = load_backbone(folder, **OPTIONS, with_head=True, causal_only=False)
    made.prepare(
        item_tokens=tokens(), backbone=backbone, head_model=backbone.causal, tie_order=torch.arange(N_ITEMS), texts={}
    )
    made.begin_stage(FINE_TUNING)
    return made.eval()


def plain_of(made: Any) -> T5ForConditionalGeneration:
    """transformers' own model with the tokens' rows where they belong: behind its table, and behind its head."""
    causal, head = made.backbone.causal, made.head.for_search()
    config = type(causal.config)(**{**causal.config.to_dict(), "vocab_size": len(head.weight)})
    plain = T5ForConditionalGeneration(config)
    plain.config.scale_decoder_outputs = head.scale != 1.0
    table = made.backbone.decoder.get_input_embeddings()
    with torch.no_grad():
        rows = torch.cat([table.table.weight, table.rows])
        plain.set_input_embeddings(nn.Embedding.from_pretrained(rows.clone(), freeze=False))
        plain.lm_head.weight = nn.Parameter(head.weight.clone())
        for half in ("encoder", "decoder"):
            state = {
                name: weight
                for name, weight in getattr(made.backbone.decoder, half).state_dict().items()
                if "embed_tokens" not in name
            }
            missing, unknown = getattr(plain, half).load_state_dict(state, strict=False)
            assert not unknown and all("embed_tokens" in name for name in missing)
    return plain.eval()


def as_labels(own: TokenBatch) -> tuple[list[list[int]], list[list[int]]]:
    """Each row's prompt and answer, one by one."""
    prompts, answers = [], []
    for row in range(len(own.ids)):
        mine = own.rows == row
        prompts.append(own.ids[row, : int(own.places[mine].min()) + 1].tolist())
        answers.append(own.labels[mine].tolist())
    return prompts, answers


@pytest.mark.parametrize("kind", tiny_t5.KINDS)
def test_the_loss_is_transformers_own(kind: str, folders_of: dict[str, Path]) -> None:
    made = build(folders_of[kind], adapter="full")
    samples = batch(made, tasks=[SEQUENTIAL, NEGATIVE], train_batch_size=24)
    prompts, answers = as_labels(samples)
    assert {len(answer) for answer in answers} == {len(SIZES) + 1}
    assert all(prompt[-1] == made.backbone.eos_id for prompt in prompts)
    assert {answer[-1] for answer in answers} == {made.backbone.eos_id}
    width = max(map(len, prompts))
    ids = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts])
    mask = torch.tensor([[1] * len(prompt) + [0] * (width - len(prompt)) for prompt in prompts])
    plain = plain_of(made)
    wanted = plain(input_ids=ids, attention_mask=mask, labels=torch.tensor(answers)).loss
    found = made.stage_loss(FINE_TUNING, samples)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    found.backward()
    wanted.backward()
    for name, weight in plain.named_parameters():
        if ".block." in name:
            own = made.backbone.decoder.get_parameter(name)
            torch.testing.assert_close(own.grad, weight.grad, atol=1e-5, rtol=1e-3)
    # Input and output have rows of their own, or one with the gradients of both.
    rows, table = made.code_tokens.inputs.grad, plain.get_input_embeddings().weight.grad
    head, count = plain.lm_head.weight.grad, len(rows)
    if kind == "t5":
        torch.testing.assert_close(rows, (table + head)[-count:], atol=1e-5, rtol=1e-3)
    else:
        torch.testing.assert_close(rows, table[-count:], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(made.code_tokens.own_outputs.grad, head[-count:], atol=1e-5, rtol=1e-3)


def test_answers_of_unlike_lengths_are_read_as_each_alone_and_equal_prompts_once(model: Any) -> None:
    base = base_of(model)
    reader = AnswerReader(base)
    prompts, answers = [[5, 9, 3], [7], [5, 9, 3], [11, 12, 13, 14]], [[4, 8, 6], [9], [2], [5, 5]]
    width = max(len(prompt) + len(answer) - 1 for prompt, answer in zip(prompts, answers))
    ids = torch.zeros(4, width, dtype=torch.long)
    rows, places = [], []
    for row, (prompt, answer) in enumerate(zip(prompts, answers)):
        whole = prompt + answer[:-1]
        ids[row, : len(whole)] = torch.tensor(whole)
        rows += [row] * len(answer)
        places += range(len(prompt) - 1, len(prompt) - 1 + len(answer))
    read: list[torch.Size] = []
    hook = base.get_encoder().register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    found = reader.states(ids, torch.tensor(rows), torch.tensor(places))
    hook.remove()
    assert read == [torch.Size([3, 4])]
    wanted = torch.cat([
        base(input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *answer[:-1]]])).last_hidden_state[0]
        for prompt, answer in zip(prompts, answers)
    ])  # fmt: skip
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_head_and_loss_see_labels_alone(folders_of: dict[str, Path]) -> None:
    made = build(folders_of["t5"])
    samples = batch(made, tasks=[SEQUENTIAL])
    states = made._reader.states(samples.ids, samples.rows, samples.places)
    assert len(states) == len(samples.labels) == len(samples.ids) * (len(SIZES) + 1)
    wanted = F.cross_entropy(made.head.logits(states), samples.labels)
    torch.testing.assert_close(made.stage_loss(FINE_TUNING, samples), wanted)


@pytest.mark.parametrize("kind", tiny_t5.KINDS)
def test_a_search_ranks_as_the_loss_does(kind: str, folders_of: dict[str, Path]) -> None:
    """Training and ranking are of one model: an item's score is what the loss of its answer says."""
    made = build(folders_of[kind], topk=[5], beams=8)
    prompt = [[5, 9, made.backbone.embed_tokens.num_embeddings + 2, made.backbone.eos_id]]
    found = made.searcher(torch.arange(N_ITEMS) > 0)(prompt)
    plain = plain_of(made)
    for item, score in zip(found.items[0].tolist(), found.scores[0].tolist()):
        labels = torch.tensor([[*made._lm_ids[made.item_tokens.of(item)].tolist(), made.backbone.eos_id]])
        loss = plain(input_ids=torch.tensor(prompt), labels=labels).loss
        assert -labels.numel() * loss.item() == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("adapter", ["none", "lora", "full"])
def test_what_trains(adapter: str, folders_of: dict[str, Path]) -> None:
    made = build(folders_of["t5-v1.1"], adapter=adapter)
    made.stage_loss(FINE_TUNING, batch(made, tasks=[SEQUENTIAL])).backward()
    trained = {name for name, weight in made.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert {"code_tokens.inputs", "code_tokens.own_outputs"} <= trained
    own = {name for name in trained if name.startswith("adapter.")}
    halves = {half for half in ("encoder", "decoder") if any(f".{half}/" in name for name in own)}
    assert halves == (set() if adapter == "none" else {"encoder", "decoder"})
    assert ("head_weight" in trained) == (adapter == "full")
    assert all("lora_" in name for name in own) or adapter == "full"


def test_its_own_dropout_is_on_only_while_all_of_it_trains(folders_of: dict[str, Path]) -> None:
    for adapter in ("full", "lora", "none"):
        made = build(folders_of["t5"], adapter=adapter, lora_dropout=0.0)
        samples = batch(made, tasks=[SEQUENTIAL])
        still = made.stage_loss(FINE_TUNING, samples)
        made.train()
        torch.manual_seed(0)
        assert torch.equal(still, made.stage_loss(FINE_TUNING, samples)) == (adapter != "full")
        made.eval()
        assert torch.equal(still, made.stage_loss(FINE_TUNING, samples))


def test_lora_equals_its_weights_merged(folders_of: dict[str, Path]) -> None:
    from peft.tuners.lora import LoraLayer

    made = build(folders_of["t5"], adapter="lora")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in made.adapter.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    samples = batch(made, tasks=[SEQUENTIAL])
    apart = made.stage_loss(FINE_TUNING, samples)
    layers = [module for module in made.backbone.decoder.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == 3 * 6 + 2 * 10
    for layer in layers:
        layer.merge()  # type: ignore[operator]
    merged = made.stage_loss(FINE_TUNING, samples)
    torch.testing.assert_close(apart, merged, atol=1e-5, rtol=1e-5)
    for layer in layers:
        layer.unmerge()  # type: ignore[operator]
    for name, weight in made.adapter.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(weight)
    assert not torch.allclose(apart, made.stage_loss(FINE_TUNING, samples), atol=1e-3)


def test_gradients_are_the_same_where_layers_run_again(folders_of: dict[str, Path]) -> None:
    gradients = []
    for again in (False, True):
        made = build(folders_of["t5"], adapter="full")
        if again:
            checkpoint_layers(made.backbone.decoder)
        made.train()
        samples = batch(made, tasks=[SEQUENTIAL])
        torch.manual_seed(2)
        made.stage_loss(FINE_TUNING, samples).backward()
        gradients.append({name: weight.grad for name, weight in made.adapter.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_state_is_saved_and_loaded(folders_of: dict[str, Path]) -> None:
    for kind in tiny_t5.KINDS:
        made = build(folders_of[kind], adapter="full")
        with torch.no_grad():
            for weight in made.parameters():
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * 0.05)
        other = build(folders_of[kind], adapter="full")
        samples = batch(made, tasks=[SEQUENTIAL])
        before = other.stage_loss(FINE_TUNING, samples)
        other.load_state_dict(made.state_dict())
        after = other.stage_loss(FINE_TUNING, samples)
        assert torch.equal(after, made.stage_loss(FINE_TUNING, samples)) and not torch.equal(after, before)


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny_t5.KINDS)
def test_a_folder_is_loaded_with_its_head_as_it_was(kind: str, folders_of: dict[str, Path]) -> None:
    backbone = load_backbone(folders_of[kind], **OPTIONS, with_head=True, causal_only=False)
    assert backbone.encodes and backbone.bos_id is None and backbone.eos_id == 1
    own = tiny_t5.model(kind, backbone.embed_tokens.num_embeddings)
    assert torch.equal(backbone.causal.lm_head.weight, own.lm_head.weight)
    assert Head.of(backbone.causal).scale == pytest.approx(32**-0.5 if kind == "t5" else 1.0)
    tied = backbone.causal.lm_head.weight is backbone.embed_tokens.weight
    assert tied == (kind == "t5")
    assert not any("lm_head" in name for name, _ in backbone.decoder.named_parameters())
    with pytest.raises(UserError, match="t5 is no causal language model, as is needed here"):
        load_backbone(folders_of[kind], **OPTIONS)


def test_texts_are_read_by_the_encoder_without_the_filling(folders_of: dict[str, Path]) -> None:
    backbone = load_backbone(folders_of["t5"], **OPTIONS, causal_only=False)
    texts = ["The red ship number 3", "", "robot", "The blue robot number 12, a film of 1995"]
    found = text_features(backbone, texts, 32)
    for row, text in enumerate(texts):
        ids = backbone.encode(text)[:32]
        if ids:
            states = backbone.decoder.get_encoder()(input_ids=torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(found[row], states.mean(0), atol=1e-5, rtol=1e-5)
    assert not found[1].any()
    assert backbone.tokens_read > 0


def test_targets_of_lora_are_checked_before_work(folders_of: dict[str, Path]) -> None:
    backbone = load_backbone(folders_of["t5"], **OPTIONS, causal_only=False)
    wanted = {**shipped(), "adapter": "lora", "lora_target_modules": ["q_proj"], "llm": "a folder"}
    with pytest.raises(UserError, match=r"no linear layer of a T5Model ends in 'q_proj' .*\bq, k, v"):
        check_targets(wanted, backbone.decoder)
    assert adapt(backbone.decoder, wanted | {"lora_target_modules": ["q", "v"], "llm_quantization": "none"})
