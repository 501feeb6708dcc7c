"""How a released adapter is opened with plain PEFT: the lines of Python in its model card, which a test runs.

They stand in the card alone; whoever else shows them takes them from there (`code_of_card`).
"""

import json
from pathlib import Path

from fedlr.models.network import PACKAGE_PREFIX, BaseModel
from fedlr.models.pooling import BIAS_FEATURE, NORMALISED

_CODE = """\
{imports}
folder = "."  # this folder, with the adapter and its tokenizer
tokenizer = AutoTokenizer.from_pretrained(folder)
{base}
base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
model = PeftModel.from_pretrained(base, folder).eval()


{classify}
"""

_TEXTS = """\
@torch.no_grad()
def classify(texts):
    \"\"\"Return the probability of each label, one row a text.\"\"\"
    tokens = tokenizer(
        texts, truncation=True, max_length={max_length}, padding=True, return_token_type_ids=False, return_tensors="pt"
    )
    return model(**tokens).logits.softmax(dim=-1)


print(classify(["a text", "another one, which is longer"]))"""

_PAIRS = """\
@torch.no_grad()
def classify(pairs):
    \"\"\"Return the probability of each label, one row a pair of texts.\"\"\"
    first, second = map(list, zip(*pairs))
    tokens = tokenizer(first, second, truncation=True, max_length={max_length}, padding=True, return_tensors="pt")
    return model(**tokens).logits.softmax(dim=-1)


print(classify([("a text", "what is asked of it"), ("another one, which is longer", "the same")]))"""

_LOADED = """\
base = AutoModelForSequenceClassification.from_pretrained(
    {where}, num_labels={num_labels}, ignore_mismatched_sizes=True, dtype=torch.float32
)"""

_POOLED = """\
class Classifier(torch.nn.Module):
    def __init__(self, encoder):
        super().__init__()
        self.config, self.{prefix} = encoder.config, encoder
        self.classifier = torch.nn.Linear({num_features}, {num_labels}, bias=False)

    def forward(self, input_ids, attention_mask, **others):
        states = self.{prefix}(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        {pool}
        features = torch.nn.functional.pad(vectors, (0, 1), value={bias})
        return SequenceClassifierOutput(logits=self.classifier(features))


base = Classifier(AutoModel.from_pretrained({where}, dtype=torch.float32))"""

_POOL = {
    "cls": "vectors = states[:, 0]",
    "mean": "vectors = (states * (mask := attention_mask[:, :, None])).sum(1) / mask.sum(1)",
    "last": "vectors = states[torch.arange(len(states)), attention_mask.sum(1) - 1]",
}
_NORMALISE = "vectors = torch.nn.functional.normalize(vectors, dim=-1)"

_MADE = """\
# The base model has random weights, and is published nowhere: fedlr makes it again.
base = {function}({arguments}).network"""


_CAUSAL = """\
base = AutoModelForCausalLM.from_pretrained({where}, dtype=torch.float32)"""

_ANSWERS = """\
@torch.no_grad()
def answer(prompt):
    \"\"\"Return what the model says to a prompt, the likeliest token each time.\"\"\"
    tokens = {tokens}
    said = model.generate(**tokens, max_new_tokens=48, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(said[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


print(answer("a prompt"))"""

_CHAT = """\
tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )"""

_CONTINUES = 'tokenizer(prompt, return_tensors="pt")'


def usage(base: BaseModel, *, max_length: int, has_pairs: bool = False) -> str:
    """Return Python that opens an adapter on its base model and reads several texts at once.

    It is run in the adapter's folder. A base in a folder is named by its whole path, one of an installed package by
    the package, a made-up network by what makes it.

    Args:
        base: of the run.
        max_length: tokens of a text, as the run cut them.
        has_pairs: rows are of two texts.
    """
    imports = ["import torch", "from peft import PeftModel"]
    auto = ["from transformers import AutoModelForSequenceClassification, AutoTokenizer"]
    if base.pooling is not None:
        auto = [
            "from transformers import AutoModel, AutoTokenizer",
            "from transformers.modeling_outputs import SequenceClassifierOutput",
        ]
    is_causal = base.task_type == "CAUSAL_LM"
    if is_causal:
        auto = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if base.made is not None:
        module, function = ("causal", "tiny_random_causal") if is_causal else ("network", "tiny_random")
        imports = [
            *imports,
            "from transformers import AutoTokenizer",
            "",
            f"from fedlr.models.{module} import {function}",
        ]
        arguments = ", ".join(f"{name}={value!r}" for name, value in base.made.items())
        loading = _MADE.format(function=function, arguments=arguments)
    else:
        imports = [*imports, *auto]
        where = json.dumps(location := reference(base.source), ensure_ascii=False)
        note = ""
        if location.startswith(PACKAGE_PREFIX):
            package, _, inside = location.removeprefix(PACKAGE_PREFIX).partition("/")
            imports = ["from importlib.util import find_spec", "", *imports]
            place = f'find_spec("{package}").submodule_search_locations[0]'
            where = f"{place} + {json.dumps('/' + inside)}" if inside else place
        elif Path(location).is_absolute():
            note = "# A folder of the machine that trained: put in where yours is; it must have the SHA-256 above.\n"
        loading = note + _loading(base, where)
    classify = (_PAIRS if has_pairs else _TEXTS).format(max_length=max_length)
    if is_causal:
        classify = _ANSWERS.format(tokens=_CHAT if isinstance(base.tokenizer.chat_template, str) else _CONTINUES)
    return _CODE.format(imports="\n".join(imports) + "\n", base=loading, classify=classify)


def _loading(base: BaseModel, where: str) -> str:
    if base.task_type == "CAUSAL_LM":
        return _CAUSAL.format(where=where)
    num_labels = len(base.network.config.id2label or {})
    if base.pooling is None:
        return _LOADED.format(where=where, num_labels=num_labels)
    pool = _POOL[base.pooling.removesuffix(NORMALISED)]
    return _POOLED.format(
        where=where,
        prefix=base.network.base_model_prefix,
        num_features=base.network.num_features,
        num_labels=num_labels,
        pool=f"{pool}\n        {_NORMALISE}" if base.pooling.endswith(NORMALISED) else pool,
        bias=BIAS_FEATURE,
    )


def reference(source: str) -> str:
    """Return the name of a base model that does not hang on where a program was started: a folder's whole path."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


def code_of_card(card: str) -> str | None:
    """Return the Python of a model card, None if there is none.

    >>> code_of_card("Words." + chr(10) + "```python" + chr(10) + "print(1)" + chr(10) + "```" + chr(10))
    'print(1)\\n'
    """
    _, found, rest = card.partition("```python\n")
    return rest.partition("```")[0] if found else None
