"""Every page with SAEs of models of other families: their tokens read as text, and nothing is asked that they lack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest
from test_pages import VIEWS, launch

from saelab.cli import main
from tests import tiny_lm
from tests.zoo import families

TEXT = "A café by the über-old harbour,\n\t日本 🌊."
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKS = "ĠĊĉÃ▁\ufffd"  # of vocabularies: byte-level ones and SentencePiece's


def sentencepiece(folder: Path) -> None:
    """A tokenizer as Llama 2 has it: pieces that begin with a ▁ for the space, bytes for what has no piece."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    trained.train_from_iterator(tiny_lm.sentences(500).split(" "), trainer)
    content = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in content["merges"]]
    model = models.BPE(content["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    whole = Tokenizer(model)
    whole.normalizer = trained.normalizer
    whole.add_special_tokens([AddedToken(name, normalized=False) for name in special[:3]])
    strip = decoders.Strip(" ", 1, 0)
    whole.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    PreTrainedTokenizerFast(
        tokenizer_object=whole, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def make(name: str, root: Path) -> Path:
    """A model of a family, a cache of it, two SAEs and an index, as the commands make them."""
    family, _, kind = name.partition(" ")
    model = families.save(family, root / "model")
    if kind == "sentencepiece":
        sentencepiece(model)
    else:
        tokenizer = tiny_lm.tokenizer(None if kind == "without-bos" else "<s>")
        tokenizer.chat_template = TEMPLATE if kind == "chat" else None
        tokenizer.save_pretrained(model)
    corpus = root / "corpus.jsonl"
    documents = [TEXT, *(tiny_lm.sentences(30, seed) for seed in range(60))]
    corpus.write_text("\n".join(json.dumps({"text": text}) for text in documents))
    given = ["--model", str(model), "--device", "cpu"]
    place = ["--hook", "blocks.1.hook_resid_post", "--context-length", "16", "--out", str(root / "cache")]
    main(["harvest", *given, *place, "--text", str(corpus), "--tokens", "1024"])
    steps = ["--batch-size", "128", "--epochs", "8", "--lr", "2e-3"]
    for variant, width in (("abs_topk", 48), ("topk", 64)):
        out = str(root / variant)
        main(
            [
                "train",
                str(root / "cache"),
                "--variant",
                variant,
                "--k",
                "4",
                "--d-sae",
                str(width),
                "--out",
                out,
                *steps,
            ]
        )
        main(["index", out, "--cache", str(root / "cache"), "--model", str(model)])
    return root


OTHER = pytest.param("pythia without-bos", marks=pytest.mark.minutes)  # lm and prompt have tests without a BOS token


@pytest.fixture(scope="module", params=[OTHER, "llama sentencepiece", "gemma2 chat"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(request.param, tmp_path_factory.mktemp("family"))


def texts(app: AppTest) -> Iterator[str]:
    """All that a page shows: text, tables, chips and figures."""
    for kind in ("markdown", "caption", "subheader", "title", "info", "warning", "error", "button", "selectbox"):
        for item in app.get(kind):
            yield str(item.proto)
            yield str(getattr(item, "value", ""))
    for item in app.get("html"):
        yield item.proto.body
    for item in app.dataframe:
        yield item.value.to_csv()
    for item in app.get("plotly_chart"):
        yield json.dumps(json.loads(item.proto.spec), ensure_ascii=False)
    for item in app.get("bidi_component"):
        yield str(item.proto)


def check(app: AppTest, view: str, written: bool = False) -> None:
    """Nothing fails, and tokens read as text; what a random model has ``written`` need not be text."""
    assert not app.exception and not app.error, (view, app.exception, app.error)
    shown, marks = "\n".join(texts(app)), MARKS.replace("\ufffd", "") if written else MARKS
    found = {mark: shown[shown.index(mark) - 60 : shown.index(mark) + 40] for mark in marks if mark in shown}
    assert not found, (view, found)


def test_every_page_with_a_model_of_another_family(
    monkeypatch: pytest.MonkeyPatch, place: Path, request: pytest.FixtureRequest
) -> None:
    app = launch(monkeypatch, place)
    app.session_state["family"] = request.node.callspec.params["place"]
    app.selectbox(key="run").select("abs_topk")
    for view in VIEWS:
        app.switch_page(f"views/{view}").run()
        check(app, view)
        {"features.py": marked, "prompt.py": read, "attribution.py": explain, "steering.py": steer}.get(view, check)(
            app, view
        )


def marked(app: AppTest, view: str) -> None:
    app.text_input(key="q").input("the quiet [[harbour]] at dawn").run()
    check(app, view)
    assert len(app.dataframe[0].value), "something fires there"


def read(app: AppTest, view: str) -> None:
    app.text_area(key="prompt_text").input(TEXT)
    app.toggle(key="prompt_gradients").set_value(True)
    app.button(key="FormSubmitter:prompt_form-Read").click().run()
    check(app, view)
    _, reading = app.session_state["prompt_reading"]
    assert "".join(reading.strings[reading.front :]).strip() == TEXT
    assert (reading.strings[0] == "<s>") == bool(reading.front)


def explain(app: AppTest, view: str) -> None:
    app.text_area(key="attribution_prompt").input(TEXT)
    app.button(key="FormSubmitter:attribution_form-Explain").click().run()
    check(app, view)
    app.button(key="attribution_continue").click().run()
    check(app, view, written=True)


def steer(app: AppTest, view: str) -> None:
    app.number_input(key="steering_latent_number").set_value(3)
    app.button(key="FormSubmitter:steering_latent-Add").click().run()
    check(app, view)
    chats = app.session_state["family"] == "gemma2 chat"
    assert ("steering_kind" in app.session_state) == chats
    assert any("chat" in place for place in app.selectbox(key="steering_where_#3").options) == chats
    app.text_area(key="steering_prompt").input("seven ships")
    app.number_input(key="steering_length").set_value(4)
    app.button(key="FormSubmitter:steering_form-Generate").click().run()
    check(app, view, written=True)
