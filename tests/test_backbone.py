"""Backbones: plain-text encoding, loading by folder or hub id, and the embedded language model."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_folders import KINDS, write
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from recbole_llm.backbone import load
from recbole_llm.backbone.base import Backbone, PlainEncoder
from recbole_llm.backbone.embedded import EmbeddedSettings, build_corpus, byte_tokenizer, train_embedded
from recbole_llm.backbone.generation import _generate
from recbole_llm.backbone.load import load_backbone
from recbole_llm.errors import UserError

STORIES = Path(__file__).parents[1].parent / "shared" / "data" / "lm" / "stories260K"
SPELLED = [
    "</s>",
    "<s>",
    "<pad>",
    "<unk>",
    "a </s> b",
    "<s><s></s>",
    "x<pad>y",
    "[INST] </s>\n",
    " </s> ",
    "<|im_end|>",
    "<a_12>",
]
TEXTS = [
    f"The {colour} {thing} {number}" for colour in ("red", "blue") for thing in ("ship", "robot") for number in range(9)
]
TEMPLATES = ["Describe: {FIRST_TOKEN}\nItems: {SECOND_TOKEN} [/INST]"]
SMALL = EmbeddedSettings(
    layers=1,
    hidden_size=32,
    heads=2,
    vocab_size=400,
    context=64,
    train_steps=80,
    train_batch_size=4,
    learning_rate=0.01,
)
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}

title = st.lists(st.sampled_from(SPELLED) | st.text(st.characters(exclude_categories=["Cs"])), max_size=4).map("".join)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    folder = tmp_path_factory.mktemp("embedded")
    return folder, train_embedded(build_corpus(TEXTS, TEMPLATES, seed=5), SMALL, seed=5, folder=folder)


@pytest.fixture(scope="module")
def embedded(trained: tuple[Path, dict[str, float]]) -> Backbone:
    return load_backbone(trained[0])


@pytest.fixture(scope="module")
def stories() -> Backbone:
    if not STORIES.is_dir():
        pytest.skip(f"SKIPPED, NOT TESTED: no pretrained model at {STORIES}")
    return load_backbone(str(STORIES))


@settings(deadline=None, max_examples=60)
@given(text=title)
def test_embedded_spells_everything_plainly(embedded: Backbone, text: str) -> None:
    ids = embedded.encode(text)
    assert {embedded.bos_id, embedded.eos_id, embedded.pad_id}.isdisjoint(ids)
    assert embedded.tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=60)
@given(text=title)
def test_stories_spells_everything_plainly(stories: Backbone, text: str) -> None:
    ids = stories.encode(text)
    assert {0, 1, 2}.isdisjoint(ids)
    # This tokenizer writes blanks as U+2581, so it cannot tell the two apart.
    assert stories.tokenizer.decode(ids) == text.replace("\u2581", " ")


@pytest.mark.parametrize("backbone", ["embedded", "stories"])
def test_plain_text_is_encoded_as_ever(backbone: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(backbone)
    for text in ("The red ship 3", "  two  blanks ", "Amélie", ""):
        assert model.encode(text) == model.tokenizer.encode(text, add_special_tokens=False)
    assert model.encode_batch(SPELLED) == [model.encode(text) for text in SPELLED]
    assert model.encode_batch([]) == []


def tokenizer_of(model: Any, pre_tokenizer: Any, markers: list[AddedToken], **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.Metaspace() if isinstance(pre_tokenizer, pre_tokenizers.Metaspace) else None
    tokenizer.add_tokens(markers)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_a_model_that_has_special_tokens_among_its_pieces() -> None:
    """T5's way: the special tokens are pieces of the unigram model itself, of the highest score there is."""
    pieces = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *((letter, -3.0) for letter in "abcdsunkp</>"),
    ]
    tokenizer = tokenizer_of(
        models.Unigram(pieces, unk_id=2),
        pre_tokenizers.Metaspace(),
        [],
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    encoder = PlainEncoder(tokenizer)
    ids = encoder.encode(["a</s>b", "</s>", "<unk><pad>", "a\u4e2d\u6587b", "\u4e2d"])
    assert all({0, 1, 2}.isdisjoint(found) for found in ids)
    texts = [
        tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(found)).replace(" ", "") for found in ids
    ]
    # What the vocabulary cannot spell (the Chinese characters) is left out, all else is there.
    assert texts == ["a</s>b", "</s>", "<unk><pad>", "ab", ""]


def test_added_tokens_that_are_not_special_are_not_found_in_text() -> None:
    letters = {letter: number for number, letter in enumerate(sorted("a12<>_| imen\u2581"))}
    markers = [
        AddedToken("<a_12>", special=False),
        AddedToken("<|im_end|>", special=True),
        AddedToken("  ", special=False),
    ]
    tokenizer = tokenizer_of(models.BPE(vocab=letters, merges=[]), None, markers, eos_token="<|im_end|>")
    code, _, blanks = (tokenizer.convert_tokens_to_ids(str(marker)) for marker in markers)
    assert tokenizer.encode("a<a_12>", add_special_tokens=False) == [letters["a"], code]
    found = PlainEncoder(tokenizer).encode(["a<a_12>", "<|im_end|>", "a  1"])
    # Blanks are text, also where the tokenizer has a token of its own for two of them.
    assert found == [
        [letters[c] for c in "a<a_12>"],
        [letters[c] for c in "<|im_end|>".replace("d", "")],
        [letters["a"], blanks, letters["1"]],
    ]


def test_padding_and_truncation_of_the_file_do_not_apply(embedded: Backbone) -> None:
    embedded.tokenizer.backend_tokenizer.enable_truncation(2)
    embedded.tokenizer.backend_tokenizer.enable_padding(length=40)
    try:
        assert PlainEncoder(embedded.tokenizer).encode(TEXTS[:2]) == embedded.encode_batch(TEXTS[:2])
    finally:
        embedded.tokenizer.backend_tokenizer.no_truncation()
        embedded.tokenizer.backend_tokenizer.no_padding()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_any_causal_model(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, capfd: Any, kind: str, tied: bool
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    common = {"vocab_size": len(tokenizer) + 5, "tie_word_embeddings": tied, "eos_token_id": 1, "pad_token_id": 2}
    torch.manual_seed(1)
    head: Any = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **common)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, **common)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=1, head_dim=8, **common)),
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, **common)),
    }[kind]().eval()
    head.save_pretrained(tmp_path)
    if kind in ("qwen2", "gpt2"):
        tokenizer.bos_token = None
    if kind == "gpt2":
        tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    capfd.readouterr()
    backbone = load_backbone(str(tmp_path))
    assert capfd.readouterr() == ("", "")

    assert backbone.hidden_size == 16
    assert (backbone.bos_id, backbone.eos_id, backbone.pad_id) == {"qwen2": (None, 1, 2), "gpt2": (None, 1, 1)}.get(
        kind, (0, 1, 2)
    )
    assert not backbone.decoder.training
    assert not any(weight.requires_grad for weight in backbone.decoder.parameters())
    assert not hasattr(backbone.decoder, "lm_head")
    ids = torch.tensor([backbone.encode("The red </s> ship")])
    with torch.no_grad():
        states = backbone.decoder(input_ids=ids).last_hidden_state
        logits = head.get_output_embeddings()(states)
        if kind == "gemma2":
            logits = torch.tanh(logits / head.config.final_logit_softcapping) * head.config.final_logit_softcapping
        expected = head(input_ids=ids).logits
    torch.testing.assert_close(logits, expected)


def test_stories_speaks(stories: Backbone) -> None:
    """Its author prints how it goes on; the hidden states must be those that say so."""
    ids = [stories.bos_id, *stories.encode("Once upon a time")]
    with torch.no_grad():
        for _ in range(30):
            state = stories.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
            ids.append(int((stories.embed_tokens.weight @ state).argmax()))
    assert stories.tokenizer.decode(ids[1:]).startswith("Once upon a time, there was a little girl named Lily.")


def test_dtype_and_attention(trained: tuple[Path, dict[str, float]], embedded: Backbone) -> None:
    other = load_backbone(str(trained[0]), dtype="bfloat16", attention="eager")
    assert other.embed_tokens.weight.dtype == torch.bfloat16
    ids = torch.tensor([embedded.encode(TEXTS[0])])
    states = [model.decoder(input_ids=ids).last_hidden_state.float() for model in (embedded, other)]
    torch.testing.assert_close(states[0], states[1], rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"dtype": "float23"}, "llm_dtype.*did you mean 'float32'"),
        ({"attention": "spda"}, "llm_attention.*did you mean 'sdpa'"),
        ({"quantization": "int4"}, "llm_quantization.*did you mean 'int8'"),
        ({"quantization": "gptq"}, "gptq needs"),
        ({"quantization": "nf4"}, "nf4 needs"),
        ({"attention": "flash_attention_2"}, "flash_attention_2 needs"),
    ],
)
def test_wrong_options(trained: tuple[Path, dict[str, float]], option: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_backbone(str(trained[0]), **option)  # type: ignore[arg-type]


def test_missing_package_and_gpu_are_told_apart(
    trained: tuple[Path, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package bitsandbytes"):
        load_backbone(str(trained[0]), quantization="int8")
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=r"needs a GPU.*'cpu'"):
        load_backbone(str(trained[0]), quantization="int8")


def test_wrong_folders(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    (tmp_path / "llama-small").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(UserError, match=r"no such folder.*llama-small"):
        load_backbone(str(tmp_path / "llama-smal"))
    with pytest.raises(UserError, match=r"no such folder.*llama-small"):
        load_backbone(str(tmp_path / "lama-small" / "deeper"))
    with pytest.raises(UserError, match=r"no config.json"):
        load_backbone(str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text("{ not json")
    with pytest.raises(UserError, match=r"no config.json.*other"):
        load_backbone(str(tmp_path / "llama-small"))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path / "other"))
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    with pytest.raises(UserError, match=r"cannot be loaded.*no_such_type"):
        load_backbone(str(tmp_path / "other"))


def test_weights_that_are_missing_or_not_ours(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))
    weights = load_file(trained[0] / "model.safetensors")
    save_file(
        {name: weight for name, weight in weights.items() if "q_proj" not in name},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UserError, match=r"lacks weights.*q_proj"):
        load_backbone(str(tmp_path))
    config = json.loads((trained[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(UserError, match="weights are gptq"):
        load_backbone(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_models_that_are_not_causal(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    tokenizer.save_pretrained(tmp_path)
    T5ForConditionalGeneration(
        T5Config(vocab_size=len(tokenizer), d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16)
    ).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="t5 is no causal"):
        load_backbone(str(tmp_path))
    BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), **SIZES)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"no causal|lacks weights"):
        load_backbone(str(tmp_path))


def test_a_tokenizer_of_another_model(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained[0] / name).read_bytes())
    with pytest.raises(UserError, match="do not belong together"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("hub", ["refuses", "hangs", "offline"])
def test_a_hub_that_cannot_be_asked_ends_in_one_line(tmp_path: Path, hub: str) -> None:
    (tmp_path / "owner" / "model-b").mkdir(parents=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if hub == "hangs":
            server.listen()
        environment = {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}",
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1" if hub == "offline" else "0",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        code = (
            "import recbole_llm.backbone.load as load; load.HUB_SECONDS = 1.0\n"
            "for name in ('owner/model-a', 'embeded'):\n"
            "    try: load.load_backbone(name)\n"
            "    except load.UserError as error: print(error)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
    first, second = done.stdout.splitlines()
    assert "hub cannot be asked" in first
    assert "owner/model-b" in first
    assert "did you mean 'embedded'" in second


def test_corpus_holds_every_text_and_filled_prompts() -> None:
    texts = ["plain", "with {FIRST_TOKEN} in it", r"back\1slash", "", " ", "plain"]
    corpus = build_corpus(texts, TEMPLATES, seed=1)
    assert Counter(corpus)["plain"] == 1
    assert {"plain", "with {FIRST_TOKEN} in it", r"back\1slash"} < set(corpus)
    prompts = [document for document in corpus if document.startswith("Describe: ")]
    assert len(prompts) == 1
    assert len(corpus) == 4
    filled = prompts[0].removeprefix("Describe: ").removesuffix(" [/INST]").split("\nItems: ")
    assert all(len(place.split("; ")) == 5 and set(place.split("; ")) <= set(texts) for place in filled)
    # How the data set numbers its items is of no account; the seed is.
    assert build_corpus(texts[::-1], TEMPLATES, seed=1) == corpus
    assert build_corpus(TEXTS, TEMPLATES, seed=1) != build_corpus(TEXTS, TEMPLATES, seed=2)
    with pytest.raises(UserError, match="no item text"):
        build_corpus(["", " "], TEMPLATES, seed=1)


def test_embedded_learns_and_is_deterministic(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, figures = trained
    monkeypatch.setattr("recbole_llm.backbone.embedded.byte_tokenizer", byte_tokenizer)  # Not the one that remembers.
    state = torch.get_rng_state()
    again = train_embedded(build_corpus(TEXTS, TEMPLATES, seed=5), SMALL, seed=5, folder=tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    assert {**again, "seconds": 0} == {**figures, "seconds": 0}
    assert figures["tokens"] == 80 * 4 * 64
    assert figures["loss"] < 0.8 * figures["unigram_loss"]

    corpus = build_corpus(TEXTS, TEMPLATES, seed=5)
    untrained = train_embedded(
        corpus, EmbeddedSettings(**{**vars(SMALL), "train_steps": 0}), seed=5, folder=tmp_path / "control"
    )
    assert untrained["steps"] == untrained["tokens"] == 0
    assert untrained["loss"] == pytest.approx(math.log(untrained["vocabulary"]), rel=0.05)
    other = train_embedded(corpus, SMALL, seed=6, folder=tmp_path / "other")
    assert other["loss"] != figures["loss"]


def test_embedded_figures_by_hand(trained: tuple[Path, dict[str, float]]) -> None:
    """The folder speaks for itself: sizes and loss recomputed from the files."""
    folder, figures = trained
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert figures["parameters"] == sum(weight.numel() for weight in model.parameters())
    assert figures["vocabulary"] == len(tokenizer) == model.config.vocab_size <= 400
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<s>", "</s>", "<pad>"]
    stream = [
        token for document in build_corpus(TEXTS, TEMPLATES, seed=5) for token in [*tokenizer.encode(document), 1]
    ]
    assert figures["corpus_tokens"] == len(stream)
    stream = stream[: 16 * 64]
    losses = []
    with torch.no_grad():
        for start in range(0, len(stream), 64):
            block = torch.tensor([stream[start : start + 64]])
            losses.append(model(input_ids=block, labels=block).loss.item())
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_embedded_settings() -> None:
    config = {f"llm_{name}": value for name, value in vars(SMALL).items()}
    assert EmbeddedSettings.from_config(config) == SMALL
    with pytest.raises(UserError, match=r"llm_hidden_size 100.*llm_heads.*nearest that can is 96"):
        EmbeddedSettings(hidden_size=100, heads=8)
    with pytest.raises(UserError, match=r"llm_vocab_size is 200.*259"):
        EmbeddedSettings(vocab_size=200)


def test_a_fingerprint_knows_one_changed_weight(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    train_embedded(["a film about rain"] * 4, EmbeddedSettings(1, 16, 2, 300, 16, train_steps=0), seed=0, folder=folder)
    first, second = load_backbone(folder), load_backbone(folder)
    assert first.fingerprint() == second.fingerprint()
    with torch.no_grad():
        next(second.decoder.parameters())[0] += 1
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize("tied", [True, False])
def test_a_fingerprint_knows_the_head_that_is_used(tied: bool, tmp_path: Path) -> None:
    folder = write(KINDS["llama"], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    if tied:
        del weights["lm_head.weight"]
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"tie_word_embeddings": True}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    without, whole = load_backbone(folder), load_backbone(folder, with_head=True)
    # What texts are read with is one model, whoever asks; a head of its own counts for whom it serves.
    assert without.fingerprint() == whole.fingerprint() and without.head_fingerprint() is None
    assert (whole.head_fingerprint() is None) == tied
    if not tied:
        weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        other = load_backbone(folder, with_head=True)
        assert other.fingerprint() == whole.fingerprint() and other.head_fingerprint() != whole.head_fingerprint()


def test_how_a_checkpoint_would_write_plays_no_part(tmp_path: Path) -> None:
    folder = write(KINDS["llama"], tmp_path / "model")
    written = []
    for penalty in (1.0, 1.8):
        (folder / "generation_config.json").write_text(
            json.dumps({"repetition_penalty": penalty, "no_repeat_ngram_size": 2, "do_sample": True, "top_k": 3}),
            encoding="utf-8",
        )
        backbone = load_backbone(folder, with_head=True)
        prompts = [backbone.encode("The red robot number 1, a film of 1995"), backbone.encode("The blue ship")]
        written.append(_generate(backbone.causal, backbone, prompts, 16))
        plain = prompts[0]
        for _ in range(16):
            plain = [*plain, int(backbone.causal(input_ids=torch.tensor([plain])).logits[0, -1].argmax())]
            if plain[-1] == backbone.eos_id:
                break
        text = backbone.tokenizer.decode(plain[len(prompts[0]) :], skip_special_tokens=True)
        assert written[-1][0] == text
    assert written[0] == written[1]


def test_a_block_of_one_token_spoils_no_figure(tmp_path: Path) -> None:
    corpus = [f"title number {number} of a story" for number in range(40)]
    tokenizer = byte_tokenizer(corpus, 300, ("<s>", "</s>", "<pad>"))
    tokens = sum(len(tokenizer.encode(text).ids) + 2 for text in corpus)
    context = next(size for size in range(24, tokens) if tokens % size == 1)
    sizes = EmbeddedSettings(1, 16, 2, 300, context, train_steps=30, train_batch_size=1)
    figures = train_embedded(corpus, sizes, seed=0, folder=tmp_path / "model")
    assert math.isfinite(figures["loss"]) and figures["corpus_tokens"] == tokens - 1


def test_weights_at_random_are_drawn_in_float32_whatever_the_folder_says(
    trained: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "half")
    file = tmp_path / "half" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": "bfloat16"}), encoding="utf-8")
    drawn = [load_backbone(folder, random_init=1).embed_tokens.weight for folder in (trained[0], tmp_path / "half")]
    assert drawn[1].dtype == torch.float32 and torch.equal(*drawn)


def test_a_random_backbone_keeps_architecture_and_tokenizer_only(trained: tuple[Path, dict[str, float]]) -> None:
    folder = trained[0]
    real, one, same, other = (load_backbone(folder, random_init=seed) for seed in (None, 1, 1, 2))
    assert one.fingerprint() == same.fingerprint()
    assert len({backbone.fingerprint() for backbone in (real, one, other)}) == 3
    assert one.encode("The red ship") == real.encode("The red ship")
    shapes = [{name: weight.shape for name, weight in b.decoder.state_dict().items()} for b in (real, one)]
    assert shapes[0] == shapes[1]
    rounded = load_backbone(folder, random_init=1, dtype="bfloat16")
    assert torch.equal(rounded.embed_tokens.weight, one.embed_tokens.weight.bfloat16())
    with pytest.raises(UserError, match="llm_random_init"):
        load_backbone(folder, random_init=1, quantization="gptq")
