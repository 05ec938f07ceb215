"""Conversations become tokens: the plain format, a template and its arguments, and the token that ends a turn."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from lco_lite.errors import ModelError
from lco_lite.models.chat import ChatFormat, PlainText, conversation
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
