"""Templates, special tokens and settings of a fine-tune go wherever its tokenizer goes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gemma3_export.errors import InputError
from gemma3_export.tokenizer import CHAT_TEMPLATE, ChatOptions, Tokenizer, load_tokenizer
from gemma3_export.tokenizer.settings import settings_from_gguf
from tests.support.chat_templates import CHATML, LLAMA_LIKE, WEATHER, write_tokenizer
from tests.support.tiny_tokenizers import tiny_byte_level_tokenizer, tiny_gemma_tokenizer

transformers = pytest.importorskip("transformers")

USER = [{"role": "user", "content": "hi"}]


def theirs(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def change(folder: Path, **entries: Any) -> dict[str, Any]:
    """Change entries of ``tokenizer_config.json``; ... removes one."""
    path = folder / "tokenizer_config.json"
    data = json.loads(path.read_text()) | entries
    data = {key: value for key, value in data.items() if value is not ...}
    path.write_text(json.dumps(data))
    return data


def check_same(folder: Path, **given: Any) -> Tokenizer:
    """Check that we and transformers read the same template and special tokens from a folder."""
    ours, other = load_tokenizer(folder), theirs(folder)
    expected = other.apply_chat_template(
        USER, return_dict=False, add_generation_prompt=True, **given
    )
    assert ours.encode_chat(USER, ChatOptions(**given)) == expected
    assert ours.special_tokens() == other.special_tokens_map
    for name in ("bos", "eos", "pad", "unk"):
        assert getattr(ours, f"{name}_token_id") == getattr(other, f"{name}_token_id"), name
    return ours


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tokenizer(tmp_path / "in", "chatml")


class TestWhereTemplatesAre:
    def test_in_the_config(self, folder: Path) -> None:
        assert check_same(folder).settings.templates == {"default": CHATML}

    def test_several_by_name_in_the_config(self, folder: Path) -> None:
        named = {"default": CHATML, "tool_use": LLAMA_LIKE, "rag": "R{{ messages[0].content }}"}
        listed = [{"name": name, "template": source} for name, source in named.items()]
        change(folder, chat_template=listed)
        tokenizer = check_same(folder)
        assert tokenizer.settings.templates == named
        check_same(folder, tools=[WEATHER])
        assert tokenizer.chat.render(USER, ChatOptions(template="rag")) == "Rhi"
        tokenizer.save(folder / "out")
        check_same(folder / "out", tools=[WEATHER])
        assert load_tokenizer(folder / "out").settings.templates == named

    def test_in_a_file_that_takes_precedence(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_text("File\n{{ messages[0].content }}\n")
        assert check_same(folder).chat.render(USER) == "File\nhi"

    def test_in_a_file_with_other_line_ends(self, folder: Path) -> None:
        (folder / "chat_template.jinja").write_bytes(b"A\r\n{% if 1 %}\r\nB\r\n{% endif %}\rC")
        check_same(folder)

    def test_in_several_files(self, folder: Path) -> None:
        change(folder, chat_template=...)
        (folder / "chat_template.jinja").write_text(CHATML)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(LLAMA_LIKE)
        assert set(check_same(folder, tools=[WEATHER]).settings.templates) == {
            "default",
            "tool_use",
        }
        check_same(folder)

    def test_in_the_processors_file_of_a_multimodal_model(self, folder: Path) -> None:
        change(folder, chat_template=...)
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
        tokenizer = load_tokenizer(folder)
        assert tokenizer.settings.templates == {"default": CHATML}
        tokenizer.save(folder / "out")
        check_same(folder / "out")

    def test_nowhere_so_that_gemmas_own_is_used(self, folder: Path) -> None:
        change(folder, chat_template=...)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.settings.templates == {}
        tokenizer.save(folder / "out")
        assert check_same(folder / "out").settings.templates == {"default": CHAT_TEMPLATE}


class TestSettings:
    def test_special_tokens_and_other_settings_are_carried_over(self, folder: Path) -> None:
        change(
            folder,
            eos_token="<|im_end|>",
            pad_token={"__type": "AddedToken", "content": "<|im_start|>", "special": True},
            model_max_length=1234,
            padding_side="left",
            boi_token="<mask>",
            extra_special_tokens={"turn_token": "<start_of_turn>"},
            chat_template="{{ bos_token }}{{ turn_token }}{{ boi_token }}{{ eos_token }}",
        )
        ours = check_same(folder)
        assert (ours.eos_token_id, ours.pad_token_id) == (601, 600)
        ours.save(folder / "out")
        check_same(folder / "out")
        for other in (theirs(folder), theirs(folder / "out")):
            assert other.model_max_length == 1234
            assert other.padding_side == "left"
            assert other.model_input_names == ["input_ids", "attention_mask"]
            assert len(other) == 602

    @pytest.mark.parametrize("make", [tiny_byte_level_tokenizer, lambda: tiny_gemma_tokenizer(300)])
    def test_no_inputs_are_named_that_the_model_does_not_take(
        self, tmp_path: Path, make: Callable[[], Tokenizer]
    ) -> None:
        # By default, PreTrainedTokenizerFast of transformers 4.57 adds token_type_ids.
        make().save(tmp_path)
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert written["model_input_names"] == ["input_ids", "attention_mask"]
        assert sorted(theirs(tmp_path)("hi")) == ["attention_mask", "input_ids"]

    def test_tokens_without_an_embedding_are_left_out(self, folder: Path) -> None:
        change(
            folder,
            image_token="<image_soft_token>",
            additional_special_tokens=["<|im_end|>", "<nowhere>"],
            extra_special_tokens=...,
        )
        load_tokenizer(folder).save(folder / "out")
        written = json.loads((folder / "out" / "tokenizer_config.json").read_text())
        assert written["additional_special_tokens"] == ["<|im_end|>"]
        assert "<image_soft_token>" not in json.dumps(written)
        assert len(theirs(folder / "out")) == 602

    def test_code_and_files_of_the_source_are_left_out(self, folder: Path) -> None:
        change(
            folder,
            auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
            tokenizer_file="/etc/passwd",
            name_or_path="/home/me",
            processor_class="Gemma3Processor",
        )
        load_tokenizer(folder).save(folder / "out")
        text = (folder / "out" / "tokenizer_config.json").read_text()
        for word in ("evil", "passwd", "/home", "Processor"):
            assert word not in text

    def test_the_older_file_of_special_tokens_is_read(self, folder: Path) -> None:
        change(folder, eos_token=...)
        content = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<unk>"}
        (folder / "special_tokens_map.json").write_text(json.dumps(content))
        assert check_same(folder).eos_token_id == 601

    @pytest.mark.parametrize(
        ("entries", "named"),
        [
            ({"chat_template": 3}, "chat template is 3"),
            ({"chat_template": [{"template": "x"}]}, "name it"),
            ({"chat_template": [{"name": "x"}]}, "chat template is None"),
            ({"chat_template": ["x"]}, "name it"),
            ({"eos_token": 3}, "eos_token is 3"),
            ({"eos_token": {"content": ["a"]}}, "eos_token"),
            ({"extra_special_tokens": {"a": {"b": 1}}}, None),
            ({"extra_special_tokens": {"a": 7}}, "extra_special_tokens is 7"),
        ],
    )
    def test_damaged_entries_are_rejected(
        self, folder: Path, entries: dict[str, Any], named: str | None
    ) -> None:
        change(folder, **entries)
        if named is None:
            load_tokenizer(folder)
            return
        with pytest.raises(InputError, match=r"tokenizer_config\.json") as caught:
            load_tokenizer(folder)
        assert named in str(caught.value)

    def test_text_without_a_utf8_form_is_kept(self, folder: Path) -> None:
        change(folder, chat_template="\ud800 ä {{ messages[0].content }}")
        tokenizer = load_tokenizer(folder)
        tokenizer.save(folder / "out")
        assert load_tokenizer(folder / "out").settings == tokenizer.settings
        with pytest.raises(InputError, match="lone surrogates"):
            tokenizer.encode_chat(USER)

    @pytest.mark.parametrize("data", [b"\xff\xfe", b"x" * (2**20 + 1)])
    def test_damaged_template_files_are_rejected(self, folder: Path, data: bytes) -> None:
        (folder / "chat_template.jinja").write_bytes(data)
        with pytest.raises(InputError, match=r"chat_template\.jinja"):
            load_tokenizer(folder)


class Metadata(dict[str, Any]):
    """GGUF metadata as a dictionary."""

    def get_field(self, key: str) -> Any:
        value = self.get(key)
        return None if value is None else type("Field", (), {"contents": lambda self: value})()


GGUF = {
    "tokenizer.ggml.tokens": ["<pad>", "<eos>", "<bos>", "<unk>", "<end_of_turn>"],
    "tokenizer.ggml.eos_token_id": 4,
    "tokenizer.ggml.bos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
    "tokenizer.chat_template": CHATML,
    "tokenizer.chat_templates": ["tool_use"],
    "tokenizer.chat_template.tool_use": LLAMA_LIKE,
}


def test_templates_and_special_tokens_come_from_gguf() -> None:
    settings = settings_from_gguf(Metadata(GGUF))
    assert settings.templates == {"default": CHATML, "tool_use": LLAMA_LIKE}
    assert settings.special_tokens == {
        "bos_token": "<bos>",
        "eos_token": "<end_of_turn>",
        "pad_token": "<pad>",
    }


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokenizer.chat_template", 3),
        ("tokenizer.chat_templates", "tool_use"),
        ("tokenizer.chat_templates", [1]),
        ("tokenizer.chat_template.tool_use", ["x"]),
        ("tokenizer.ggml.eos_token_id", 5),
        ("tokenizer.ggml.eos_token_id", -1),
        ("tokenizer.ggml.eos_token_id", "4"),
    ],
)
def test_damaged_gguf_metadata_is_rejected(key: str, value: object) -> None:
    with pytest.raises(InputError, match=key.split(".")[-1].split("_")[0]):
        settings_from_gguf(Metadata(GGUF | {key: value}))
