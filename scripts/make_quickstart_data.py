"""Write the pool and the two validation tasks of the bundled quickstart.

The problems and their solutions come from reasoning-gym; the wording of the chat turns is ours. Each skill has
three disjoint sets of phrasings: one for the corpus that trains the bundled model, one for the pool, and, for the
two validation tasks, one of their own. The corpus mixes the answer styles of a skill, the pool always uses the
first: so the model knows the skills, but warming it up on the pool still teaches it something.

Run `python scripts/make_quickstart_data.py` from the repository root. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import reasoning_gym
from reasoning_gym.algorithmic.word_sorting import TextTransformation
from reasoning_gym.arithmetic.leg_counting import ANIMALS

# The version that made the bundled files; another one may draw other problems from the same seed.
GENERATED_WITH = "0.1.25"
SEED = 0
VALIDATION_SIZE = 32
DATA_FOLDER = Path(__file__).resolve().parents[1] / "src" / "iprox" / "quickstart" / "data"

# reasoning-gym seeds item i with `seed + i`, so nearby seeds repeat each other's problems: keep them far apart.
SPLIT_STRIDE = 1_000_000_000
SKILL_STRIDE = 10_000_000
SPLITS = ("validation", "pool", "corpus", "held_out")

Fields = dict[str, str]


@dataclass(frozen=True)
class Skill:
    """One source: where its problems come from, and how questions and answers are worded.

    Attributes:
        dataset: the reasoning-gym generator.
        config: its settings.
        fields: turns one of its items into template fields; "problem" identifies it; None skips the item.
        corpus: question templates used only to train the bundled model.
        pool: question templates used only in the pool.
        answers: answer templates; the pool and the validation tasks use the first one.
        count: how many examples the pool has.
        validation: question templates of the validation task; empty if this skill is not one.
    """

    dataset: str
    config: dict[str, Any]
    fields: Callable[[dict[str, Any]], Fields | None]
    corpus: tuple[str, ...]
    pool: tuple[str, ...]
    answers: tuple[str, ...]
    count: int
    validation: tuple[str, ...] = field(default=())


def _arithmetic(item: dict[str, Any]) -> Fields | None:
    expression = item["metadata"]["expression"]
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {result}.")
        total = result
    return {"problem": expression, "steps": " ".join(steps), "answer": item["answer"]}


def _equation(item: dict[str, Any]) -> Fields | None:
    equation, variable = item["metadata"]["equation"], item["metadata"]["variable"]
    check = equation.replace(variable, item["answer"])
    return {"problem": equation, "variable": variable, "answer": item["answer"], "check": check}


def _legs(item: dict[str, Any]) -> Fields | None:
    animals = item["metadata"]["animals"]
    parts = [count * ANIMALS[name] for name, count in animals.items()]
    work = ", ".join(f"{name} {count} * {ANIMALS[name]} = {count * ANIMALS[name]}" for name, count in animals.items())
    listing = ", ".join(f"{name} ({count})" for name, count in animals.items())
    total = f"{' + '.join(map(str, parts))} = {item['answer']}"
    return {"problem": listing, "work": work, "total": total, "answer": item["answer"]}


def _sequence(item: dict[str, Any]) -> Fields | None:
    shown = ", ".join(map(str, item["metadata"]["sequence"][:-1]))
    return {"problem": shown, "rule": item["metadata"]["rule"], "answer": item["answer"]}


def _sorting(item: dict[str, Any]) -> Fields | None:
    data = item["metadata"]
    up = data["direction"] == "ascending"
    return {
        "problem": ", ".join(data["transformed_words"]),
        "order": "alphabetical" if up else "reverse alphabetical",
        "ends": "from A to Z" if up else "from Z to A",
        "commas": ", ".join(data["sorted_words"]),
        "numbered": "\n".join(f"{place}. {word}" for place, word in enumerate(data["sorted_words"], 1)),
        "spoken": " then ".join(data["sorted_words"]),
    }


def _reversal(item: dict[str, Any]) -> Fields | None:
    words = [word.lower() for word in item["metadata"]["words"]]
    back = words[::-1]
    return {"problem": " ".join(words), "bullets": "\n".join(f"- {w}" for w in back), "spaces": " ".join(back)}


def _letters(item: dict[str, Any]) -> Fields | None:
    letter = item["metadata"]["target_letter"].lower()
    words = [word.lower() for word in item["metadata"]["span"]]
    counts = [(word, word.count(letter)) for word in words if letter in word]
    work = ", ".join(f"{word} {count}" for word, count in counts)
    text = " ".join(words)
    answer = str(sum(count for _, count in counts))
    return {"problem": f'"{letter}" in "{text}"', "letter": letter, "text": text, "work": work, "answer": answer}


def _spelling(item: dict[str, Any]) -> Fields | None:
    word = item["metadata"]["word"].lower()
    return {"problem": word, "letters": "-".join(word[::-1]), "backwards": word[::-1]}


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _calendar(item: dict[str, Any]) -> Fields | None:
    offset = item["metadata"]["offset_days"]
    if offset == 0:
        return None
    start = date.fromisoformat(item["metadata"]["start_date"])
    today = f"{start:%A, %B} {start.day}, {start.year}"
    weeks, days = divmod(abs(offset), 7)
    side = "after" if offset > 0 else "before"
    return {
        "problem": f"{today} {offset}",
        "today": today,
        "offset": f"{_counted(abs(offset), 'day')} {side}",
        "work": f"{_counted(abs(offset), 'day')} = {_counted(weeks, 'week')} and {_counted(days, 'day')}",
        "rest": f"{_counted(days, 'day')} {side} {today.split(',')[0]}",
        "answer": item["answer"],
    }


def _holds(statement: str, world: tuple[frozenset[str], ...]) -> bool:
    quantifier, rest = statement.split(" ", 1)
    subject, predicate = rest.split(" are ")
    negated, predicate = predicate.startswith("not "), predicate.removeprefix("not ")
    subjects = [thing for thing in world if subject in thing]
    if quantifier == "Some":
        return any((predicate in thing) != negated for thing in subjects)
    return all((predicate in thing) == (quantifier == "All") for thing in subjects)


def _follows(premises: Sequence[str], claim: str) -> bool:
    """Check every world of things; as in the classical syllogism, no term is empty."""
    terms = {term.removeprefix("not ") for s in (*premises, claim) for term in s.split(" ", 1)[1].split(" are ")}
    kinds = [frozenset(kind) for n in range(1, 4) for kind in itertools.combinations(sorted(terms), n)]
    for size in range(1, len(kinds) + 1):
        for world in itertools.combinations(kinds, size):
            possible = frozenset().union(*world) == terms and all(_holds(s, world) for s in premises)
            if possible and not _holds(claim, world):
                return False
    return True


def _syllogism(item: dict[str, Any]) -> Fields | None:
    data = item["metadata"]
    premises, claim = (data["premise1"], data["premise2"]), data["conclusion"]
    yes = item["answer"] == "Yes"
    if yes != _follows(premises, claim):  # reasoning-gym calls some invalid forms valid
        return None
    fact = claim[0].lower() + claim[1:]
    return {
        "problem": f"{premises[0]}. {premises[1]}. {claim}",
        "premises": f"{premises[0]}. {premises[1]}.",
        "claim": claim,
        "verdict": f"Yes. It must be true that {fact}." if yes else f"No. It need not be true that {fact}.",
        "short": "It follows." if yes else "It does not follow.",
        "answer": item["answer"],
    }


def _family(item: dict[str, Any]) -> Fields | None:
    data = item["metadata"]
    story = item["question"].split("\n\n")[0]
    one, other = data["person1"], data["person2"]
    return {"problem": f"{story} {one} {other}", "story": story, "one": one, "other": other, "answer": item["answer"]}


def _filtering(item: dict[str, Any]) -> Fields | None:
    data = item["metadata"]
    action, size = data["operation"].split("_")
    return {
        "problem": f"[{', '.join(data['original_numbers'])}] {data['operation']} {data['filter_value']}",
        "numbers": f"[{', '.join(data['original_numbers'])}]",
        "action": f"{action} the numbers {size} than {data['filter_value']}",
        "list": f"[{', '.join(data['result'])}]",
        "spaces": " ".join(data["result"]) or "nothing",
    }


def _clock(item: dict[str, Any]) -> Fields | None:
    # The dates in the metadata are today's: only the times are reproducible.
    start, end = (item["metadata"][key][11:16] for key in ("start_time", "end_time"))
    hours, minutes = map(int, item["answer"].split(":"))
    return {
        "problem": f"{start} {end}",
        "start": start,
        "end": end,
        "words": f"{hours} h {minutes} min",
        "minutes": str(60 * hours + minutes),
        "answer": item["answer"],
    }


def _binary(item: dict[str, Any]) -> Fields | None:
    number, bits = item["metadata"]["number"], item["metadata"]["binary"]
    powers = " + ".join(str(1 << place) for place in range(len(bits) - 1, -1, -1) if number >> place & 1)
    return {"problem": str(number), "powers": powers, "bits": bits, "answer": item["answer"]}


SKILLS: dict[str, Skill] = {
    "arithmetic": Skill(
        "chain_sum",
        {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2},
        _arithmetic,
        ("What is {problem}?", "Calculate {problem}.", "{problem} = ?"),
        (
            "Work out {problem} step by step.",
            "Please add this up: {problem}",
            "I need the value of {problem}. Show each step.",
            "Can you evaluate {problem} for me?",
        ),
        ("{steps} The answer is {answer}.", "{problem} = {answer}", "{answer}", "It is {answer}."),
        220,
        ("Solve {problem} and show your working.", "My bill reads {problem}. How much is that?", "Compute: {problem}"),
    ),
    "equations": Skill(
        "simple_equations",
        {"min_terms": 2, "max_terms": 3, "max_value": 20},
        _equation,
        ("Solve {problem} for {variable}.", "{problem}, what is {variable}?", "Find {variable}: {problem}"),
        (
            "Which {variable} makes {problem} true?",
            "If {problem}, then what must {variable} be?",
            "Please find the unknown in {problem} and check it.",
        ),
        ("{variable} = {answer}, because {check}.", "{answer}", "The solution is {variable} = {answer}."),
        120,
    ),
    "legs": Skill(
        "leg_counting",
        {"min_animals": 2, "max_animals": 3, "max_instances": 12},
        _legs,
        ("How many legs do {problem} have?", "Count the legs: {problem}.", "{problem}: how many legs?"),
        (
            "My farm has these animals: {problem}. How many legs walk there?",
            "Add up all the legs of {problem}.",
            "A zoo keeps {problem}. What is the total number of legs?",
        ),
        ("{work}. In all {total} legs.", "{answer} legs", "{answer}"),
        140,
    ),
    "sequence": Skill(
        "number_sequence",
        {"min_terms": 4, "max_terms": 6, "min_value": -50, "max_value": 50, "max_complexity": 2},
        _sequence,
        ("What comes next: {problem}?", "Continue: {problem}", "{problem}, ?"),
        (
            "Find the rule behind {problem} and give the next number.",
            "I wrote {problem}. Which number should follow, and why?",
            "Extend this series by one term: {problem}",
        ),
        ("Rule: {rule}. Next: {answer}", "{answer}", "The next number is {answer}."),
        140,
    ),
    "sorting": Skill(
        "word_sorting",
        {"min_words": 3, "max_words": 6, "max_word_length": 9, "transformation": TextTransformation.LOWERCASE},
        _sorting,
        ("Sort {ends}: {problem}", "Sort these words {ends}: {problem}", "{problem}. Sort them {ends}."),
        (
            "Put these words in {order} order: {problem}",
            "Arrange the list {problem} {ends}.",
            "Here are some words: {problem}. Please list them in {order} order.",
            "How would {problem} appear in a dictionary read {ends}?",
        ),
        ("{commas}", "{numbered}", "First {spoken}."),
        200,
    ),
    "reversal": Skill(
        "word_sequence_reversal",
        {"min_words": 3, "max_words": 6},
        _reversal,
        ("Reverse: {problem}", "Reverse the words: {problem}", "{problem}. Now the words from last to first."),
        (
            "Read these words back to me from the end: {problem}",
            "List the words of this line, last word first: {problem}",
            "Turn the word order around: {problem}",
        ),
        ("{bullets}", "{spaces}", "Reversed: {spaces}"),
        130,
    ),
    "letters": Skill(
        "letter_counting",
        {"min_words": 4, "max_words": 8},
        _letters,
        ("Count {problem}.", "How many {problem}?", "How often is {problem}?"),
        (
            'Go through the words of "{text}" and count the letter {letter}.',
            "How many times do I write {letter} in: {text}",
            "Tell me in which words the letter {letter} occurs, and the total: {text}",
        ),
        ("{work}; total {answer}", "{answer}", 'There are {answer} of "{letter}".'),
        130,
    ),
    "spelling": Skill(
        "spell_backward",
        {"min_word_len": 4, "max_word_len": 9},
        _spelling,
        ("Spell {problem} backwards.", "{problem} backwards", "Reverse the letters of {problem}."),
        (
            "Write the word {problem} from its last letter to its first.",
            "What do you see if you hold {problem} to a mirror?",
            'Flip the spelling of "{problem}", please.',
        ),
        ("{letters}: {backwards}", "{backwards}", "It becomes {backwards}."),
        140,
        (
            "Read {problem} from right to left.",
            "Please type {problem} the other way round, letter by letter.",
            "If I start at the end of {problem}, which letters come one after another?",
        ),
    ),
    "calendar": Skill(
        "calendar_arithmetic",
        {"tasks": ["weekday_offset"], "offset_upper_bound": 60},
        _calendar,
        ("Which weekday is {offset} {today}?", "{offset} {today} is a", "Name the weekday {offset} {today}."),
        (
            "Today is {today}. Tell me the day of the week {offset} today.",
            "My meeting is {offset} {today}. On which weekday does it fall?",
            "Starting at {today}, which weekday lies {offset} it?",
        ),
        ("{work}; {rest} is {answer}.", "{answer}", "It is a {answer}."),
        140,
    ),
    "syllogism": Skill(
        "syllogism",
        {},
        _syllogism,
        (
            "{premises} Does it follow: {claim}?",
            "{premises} So: {claim}. Right?",
            "Given: {premises} Is this sure: {claim}?",
        ),
        (
            "Suppose we know this. {premises} Can we conclude the following? {claim}.",
            "Check my logic. {premises} Therefore: {claim}.",
            "{premises} Someone claims: {claim}. Must they be right?",
        ),
        ("{verdict}", "{answer}", "{short}"),
        160,
    ),
    "family": Skill(
        "family_relationships",
        {"min_family_size": 4, "max_family_size": 6},
        _family,
        (
            "{story} Who is {one} to {other}?",
            "{story} {one} is the what of {other}?",
            "{story} Relation of {one} to {other}?",
        ),
        (
            "I met a family. {story} How is {one} related to {other}?",
            "{story} What should {other} call {one}?",
            "Read this and name the relation. {story} What is {one} for {other}?",
        ),
        ("{one} is the {answer} of {other}.", "{answer}", "The {answer}."),
        160,
    ),
    "filtering": Skill(
        "number_filtering",
        {"min_numbers": 4, "max_numbers": 7, "max_decimals": 1},
        _filtering,
        ("From {numbers} {action}.", "{numbers}: {action}", "Take {numbers} and {action}."),
        (
            "Here is a list: {numbers}. I want you to {action}.",
            "What is left of {numbers} if you {action}?",
            "Clean this data, {action}: {numbers}",
        ),
        ("{list}", "{spaces}", "The result is {list}."),
        120,
    ),
    "clock": Skill(
        "time_intervals",
        {"task_types": ["time"], "max_time_difference_seconds": 43_200},
        _clock,
        ("How long is {start} to {end}?", "{start} to {end}, how long?", "Time between {start} and {end}?"),
        (
            "The film began at {start} and was over at {end}. How long did it run?",
            "I left at {start} and came home at {end}. How long was I away?",
            "A shift goes from {start} until {end}. Give its length.",
        ),
        ("{words}", "{answer}", "{minutes} minutes"),
        110,
    ),
    "binary": Skill(
        "count_bits",
        {"max_n": 16_383},
        _binary,
        ("{problem} in binary", "Write {problem} in base 2.", "Binary of {problem}?"),
        (
            "Split {problem} into powers of two and write it in binary.",
            "How does a computer store the number {problem} in bits?",
            "Convert the decimal number {problem} to binary and count its ones.",
        ),
        ("{powers}, so {bits} (ones: {answer})", "{bits}", "0b{bits}"),
        90,
    ),
}


def generate(source: str, split: str, *, seed: int = SEED, seen: set[str]) -> Iterator[dict[str, Any]]:
    """Yield examples of one skill, without end, never a problem that is in `seen`.

    Args:
        source: a key of `SKILLS`.
        split: one of `SPLITS`; it sets the phrasings, the answer styles and the seed range.
        seed: the global seed.
        seen: problems already used, as "source: problem"; each problem yielded is added to it.

    Yields:
        Rows with the fields "source" and "messages" (one user turn, one assistant turn).

    Raises:
        ValueError: `split` is "validation" and the skill has no validation phrasings.
    """
    skill = SKILLS[source]
    questions = {"validation": skill.validation, "pool": skill.pool}.get(split, skill.corpus)
    if not questions:
        raise ValueError(f"{source} is not a validation task")
    answers = skill.answers[:1] if split in ("validation", "pool") else skill.answers
    first = seed + SPLITS.index(split) * SPLIT_STRIDE + list(SKILLS).index(source) * SKILL_STRIDE
    problems = reasoning_gym.create_dataset(skill.dataset, seed=first, size=SKILL_STRIDE, **skill.config)
    wording = random.Random(f"{seed} {split} {source}")
    for index in itertools.count():
        fields = skill.fields(problems[index])
        if fields is None or f"{source}: {fields['problem']}" in seen:
            continue
        seen.add(f"{source}: {fields['problem']}")
        question = wording.choice(questions).format_map(fields)
        answer = wording.choice(answers).format_map(fields)
        yield {
            "source": source,
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        }


def validation_tasks() -> list[str]:
    """Return the names of the skills that are validation tasks."""
    return [source for source, skill in SKILLS.items() if skill.validation]


def make_files(seed: int = SEED) -> tuple[dict[str, list[dict[str, Any]]], set[str]]:
    """Make the bundled files.

    Args:
        seed: the global seed.

    Returns:
        The rows of each file by its name, and the problems they use ("source: problem"), which the corpus avoids.
    """
    seen: set[str] = set()
    files: dict[str, list[dict[str, Any]]] = {}
    # Validation first: the pool then avoids its problems.
    for task in validation_tasks():
        rows = itertools.islice(generate(task, "validation", seed=seed, seen=seen), VALIDATION_SIZE)
        files[f"{task}.val.jsonl"] = [{"id": f"{task}-val-{n:03d}", **row} for n, row in enumerate(rows)]
    pool = []
    for source, skill in SKILLS.items():
        rows = itertools.islice(generate(source, "pool", seed=seed, seen=seen), skill.count)
        pool += [{"id": f"{source}-{n:03d}", **row} for n, row in enumerate(rows)]
    random.Random(f"{seed} order").shuffle(pool)
    files["pool.jsonl"] = pool
    return files, seen


def to_jsonl(rows: list[dict[str, Any]]) -> str:
    """Return the rows as JSONL text, one compact object a line."""
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DATA_FOLDER)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    files, _ = make_files(args.seed)
    for name, rows in files.items():
        temporary = args.output / f".{name}.tmp"
        temporary.write_text(to_jsonl(rows), encoding="utf-8", newline="\n")
        os.replace(temporary, args.output / name)
        print(f"{args.output / name}: {len(rows)} examples")


if __name__ == "__main__":
    main()
