"""Conversations become tokens: the plain format, a template and its arguments, and the token that ends a turn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from lco_lite.errors import ModelError
from lco_lite.messages import conversation
from lco_lite.models.chat import ChatFormat, PlainText
from lco_lite.models.loading import byte_tokenizer
from lco_lite.recipe.file import load_recipe

# the switch as Qwen 3 has it: thinking unless told otherwise, an empty thought where it is switched off
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
ASKED = conversation("2+2", "Be brief.")


def templated(template: str | None):
    tokenizer = byte_tokenizer(256)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("arguments", "thought"), [({}, ""), ({"enable_thinking": False}, "<think>\n\n</think>\n\n")])
def test_template_arguments_of_the_recipe_reach_the_prompt(tiny, arguments, thought):
    recipe = load_recipe(tiny, [f"chat.template_args.{key}={value}" for key, value in arguments.items()])
    chat = ChatFormat(templated(THINKING), recipe.chat.template_args)
    assert chat.prompt_text(ASKED) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n<|im_start|>assistant\n" + thought
    )
    assert chat.text(chat.response("4")) == "4"


def test_a_turn_ends_with_the_templates_token_and_a_cut_response_with_none():
    tokenizer = templated(THINKING)
    chat = ChatFormat(tokenizer)
    assert chat.end == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    example = chat.example(ASKED, "4")
    assert example.response[-1] == chat.end and chat.example(ASKED, "4", closed=False).response == example.response[:-1]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("{{ messages[0].role }}", "leaves out what user and assistant say"),
        ("{{ messages[0].content }}", "what assistant say"),
    ],
)
def test_a_template_that_leaves_out_what_is_said_is_refused_with_file_and_field(template, told):
    tokenizer = templated(template)
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ModelError, match=rf"some/model: its chat_template \(tokenizer_config.json .*{told}"):
        ChatFormat(tokenizer)


def test_without_a_template_the_plain_format_ends_with_eos():
    tokenizer = templated(None)
    chat = ChatFormat(tokenizer)
    assert chat.prompt_text(ASKED).endswith("### System:\nBe brief.\n\n### User:\n2+2\n\n### Assistant:\n")
    assert chat.end == tokenizer.eos_token_id


def merging(*merges: tuple[str, str], bos: bool = False):
    """A tokenizer of bytes that also joins some of them; ``bos``: it begins every text with a special token."""
    tokenizer = templated(THINKING)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = [list(pair) for pair in merges]
    state["model"]["vocab"] |= {"".join(pair): 300 + i for i, pair in enumerate(merges)}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
        )
    return tokenizer


def lm_evals_pair(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """``TemplateLM._encode_pair`` of lm-eval 0.4.12 in other words: spaces move over, whole and part are encoded."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, part = tokenizer.encode(context + continuation), tokenizer.encode(context)
    return part, whole[len(part) :]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("ending", ["\nAnswer:", "\nAnswer: ", "\nAnswer:\n", "?"])
def test_plain_text_and_its_choices_are_tokenised_as_lm_eval_does(ending, bos):
    tokenizer = merging(("\u0120", "A"), ("\u010a", "B"), ("?", "\u0120"), bos=bos)
    messages = [
        *conversation("1+1" + ending, "Sums."),
        {"role": "assistant", "content": "B"},
        *conversation("2+2" + ending),
    ]
    plain, gap = PlainText(tokenizer), "" if ending[-1].isspace() else " "
    context = f"Sums.\n\n1+1{ending}{gap}B\n\n2+2{ending}"
    assert plain.prompt_text(messages) == context
    assert plain.prompt(messages) == tokenizer.encode(context), "sampling goes on from the whole prompt"
    prompt, letters = plain.choices(messages, "AB")
    assert [(prompt, ids) for ids in letters] == [lm_evals_pair(tokenizer, context, gap + letter) for letter in "AB"]
    assert (prompt[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")) == bos
    if ending == "\nAnswer:":
        assert letters[0] == [300], "a space and the letter are one token"


def test_an_answer_that_the_tokenizer_joins_to_its_prompt_is_refused():
    tokenizer = merging(("\u0120", "A"), (":", "\u0120A"))
    with pytest.raises(ModelError, match="joins an answer to the end of its prompt"):
        PlainText(tokenizer).choices(conversation("Answer:"), "A")


def test_specials_inside_a_response_are_left_out_of_its_text():
    chat = ChatFormat(templated(THINKING))
    assert chat.text(chat.response("4") + chat.response("5")) == "45"


def test_a_template_that_refuses_a_role_is_told_with_the_roles():
    picky = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + THINKING
    with pytest.raises(ModelError, match=r"roles system, user: .*no system role"):
        ChatFormat(templated(picky)).prompt(ASKED)


def test_a_tokenizer_that_can_end_no_response_is_refused():
    tokenizer = templated(None)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="could never end"):
        ChatFormat(tokenizer)


# what these families' templates do with a last answer, in few words
TURNS = "{% for m in messages if m.role != 'assistant' %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
ANSWERED = "{% if messages[-1].role == 'assistant' %}{% set c = messages[-1].content %}"
ASKS = "{% endif %}{% if add_generation_prompt %}"
PARTS = "{% set p = c.split('</think>') %}{% set t = p[0].split('<think>')[-1].strip() if p|length > 1 else '' %}"
R1 = f"{TURNS}{ANSWERED}A:{{{{ c.split('</think>')[-1] }}}}<|im_end|>{ASKS}A:<think>\n{{% endif %}}"
THOUGHT = "A:<think>\n{{ t }}\n</think>\n\n{{ p[-1].strip() }}<|im_end|>\n"
QWEN3 = f"{TURNS}{ANSWERED}{PARTS}{THOUGHT}{ASKS}A:{{% endif %}}"
QWEN35 = f"{TURNS}{ANSWERED}{PARTS}{THOUGHT}{ASKS}A:<think>\n{{% endif %}}"
NEMOTRON = f"{TURNS}{ANSWERED}A:<think></think>{{{{ c }}}}<|im_end|>\n{ASKS}A:<think>\n{{% endif %}}"
HARMONY = f"{TURNS}{ANSWERED}<|im_start|>A<|final|>{{{{ c }}}}<|im_end|>{ASKS}<|im_start|>A{{% endif %}}"
TRIMS = f"{TURNS}{ANSWERED}A: {{{{ c | trim }}}}<|im_end|>{ASKS}A:{{% endif %}}"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("template", "given", "prompt_ends", "trained"),
    [
        (QWEN3, "4", "A:", f"{EMPTY}4"),
        (QWEN3, "<think>two\n</think>\n4", "A:", "<think>\ntwo\n</think>\n\n4"),
        (QWEN35, "4", "A:<think>\n", "\n</think>\n\n4"),
        (QWEN35, "<think>two</think>4", "A:<think>\n", "two\n</think>\n\n4"),
        (QWEN35, "two</think>4", "A:<think>\n", "two\n</think>\n\n4"),
        (NEMOTRON, "4", "A:<think>\n", "</think>4"),
        (NEMOTRON, "<think>\ntwo</think>4", "A:<think>\n", "two</think>4"),
        (HARMONY, "4", "<|im_start|>A", "<|final|>4"),
        (TRIMS, "4\n", "A:", " 4"),
        (R1, "<think>\ntwo\n</think>\n\n4", "A:<think>\n", "two\n</think>\n\n4"),
    ],
)
def test_an_answer_is_trained_as_the_template_writes_it_after_its_prompt(template, given, prompt_ends, trained):
    said: list[str] = []
    chat = ChatFormat(templated(template), warn=said.append)
    example = chat.example(ASKED, given)
    assert chat.prompt_text(ASKED).endswith(prompt_ends) and example.prompt == chat.prompt(ASKED)
    assert chat.tokenizer.decode(example.response) == f"{trained}<|im_end|>"
    assert example.response[-1] == chat.end and not said


def test_a_thought_that_the_prompt_opens_and_the_template_drops_is_closed_and_that_is_said_once():
    said: list[str] = []
    chat = ChatFormat(templated(R1), warn=said.append)
    for given in ("4", "<b>5</b>", ""):
        assert chat.answer_text(ASKED, given) == f"\n</think>\n\n{given}"
    (warning,) = said
    assert "opens <think>" in warning and "close it first" in warning


DROPS = TURNS + ANSWERED + "A:{{ c.split('</think>')[-1] }}<|im_end|>" + ASKS + "A:{% endif %}"
SYSTEM_LAST = (  # Mistral: the system text stands in the last turn, if that is the user's
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[{% if loop.last %}"
    "{{ messages[0].content }} {% endif %}{{ m.content }}]{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "arguments", "given", "writes"),
    [
        (DROPS, {}, "<think>two</think>4", "writes '4<|im_end|>' where its prompt and the answer have '<think>two"),
        (SYSTEM_LAST, {}, "4", "writes '2+2]4<|im_end|>' where its prompt and the answer have 'Be brief. 2+2]4'"),
        (THINKING, {"enable_thinking": False}, "4", "writes '4<|im_end|>"),
    ],
)
def test_an_answer_that_the_template_cannot_place_follows_the_prompt_and_that_is_said(
    template, arguments, given, writes
):
    said: list[str] = []
    chat = ChatFormat(templated(template), arguments, said.append)
    assert chat.answer_text(ASKED, given) == given and chat.answer_text(ASKED, f"{given}4") == f"{given}4"
    (warning,) = said
    assert writes in warning


def test_an_answer_that_the_template_only_closes_has_the_tokens_it_always_had():
    for template in (THINKING, None):
        chat = ChatFormat(templated(template), warn=pytest.fail)
        for text in ("4", " 4\n", "", "<think>\ntwo</think>4"):
            assert chat.answer(ASKED, text) == chat.response(text) == [*chat.ids(text), chat.end]


def test_the_space_that_a_template_writes_is_not_doubled_by_sentencepiece():
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate(["<s>", "</s>", *"[]+24▁", "▁4"])}
    made = Tokenizer(models.BPE(words, [("▁", "4")]))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )  # as Llama 2 has it
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    turn = "'[' + m.content + ']' if m.role == 'user' else ' ' + m.content + '</s>'"
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {turn} }}}}{{% endfor %}}"
    chat = ChatFormat(tokenizer, warn=pytest.fail)
    assert chat.answer_text(conversation("2+2"), "4") == " 4"
    answer = chat.answer(conversation("2+2"), "4")
    assert tokenizer.convert_ids_to_tokens(answer) == ["▁4", "</s>"] != tokenizer.convert_ids_to_tokens(chat.ids(" 4"))


def test_what_comes_before_an_answer_is_known_without_one():
    leads = [ChatFormat(templated(t), warn=[].append).lead() for t in (THINKING, None, TRIMS, QWEN3, R1, HARMONY)]
    assert leads == ["", "", "", EMPTY, "\n</think>\n\n", "<|final|>"]


def peers_templates() -> list[Path]:
    trl = pytest.importorskip("trl")
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


# TRL drops the end of the prompt where the whole conversation has another, so that it trains after a prompt that is
# never asked; here the prompt stays and the thought is closed
ASKED_OTHERWISE = {"deepseek_r1_distill": "\n</think>\n\n4", "deepseekv3": "\n</think>\n\n4"} | {
    f"nemotron_3_{size}": "</think>4" for size in ("nano", "super", "ultra", "5_lightning")
}
LISTS_ONLY = ("idefics3", "smolvlm", "llava_next")  # multimodal: content is a list


def test_templates_in_use_are_written_as_trl_writes_them():
    """Prompt and completion of 40 templates and more, as TRL's ``apply_chat_template`` has them."""
    checked = 0
    for file in peers_templates():
        if file.stem.startswith(LISTS_ONLY) or file.stem.endswith("_training"):
            continue
        from trl.data_utils import apply_chat_template

        tokenizer = templated(file.read_text(encoding="utf-8"))
        tokenizer.bos_token = "<|im_start|>"
        chat = ChatFormat(tokenizer, warn=[].append)
        messages = [*conversation("a"), {"role": "assistant", "content": "b"}, *conversation("2+2")]
        ours = chat.prompt_text(messages), chat.answer_text(messages, "4")
        if file.stem in ASKED_OTHERWISE:
            assert ours[1] == ASKED_OTHERWISE[file.stem] and ours[0].endswith("<think>\n"), file.stem
        else:
            row = {"prompt": messages, "completion": [{"role": "assistant", "content": "4"}]}
            theirs = apply_chat_template(row, tokenizer)
            assert theirs["prompt"] == ours[0] and theirs["completion"].startswith(ours[1]), file.stem
            assert theirs["completion"].removeprefix(ours[1]) == chat._closing, file.stem
        checked += 1
    assert checked > 30
