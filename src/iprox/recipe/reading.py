"""YAML as a recipe may have it: each key once, no merge keys, and no more of it than a person writes."""

from __future__ import annotations

from typing import Any

import yaml

from iprox.errors import cut, one_line, shown

# Levels of a document, and values it holds once its aliases are written out; a few hundred bytes of aliases of aliases
# can stand for gigabytes. A recipe has five levels, and as many values as it has files.
DEEPEST, MOST = 50, 100_000

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(text: str) -> Any:
    """The value of a YAML document.

    Raises:
        ValueError: it is none, gives a key twice, merges keys, or stands for more than a recipe may (`MOST`); the
            message is one line.
    """
    try:
        _check_depth(text)
        loader = _EachKeyOnce(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_size(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(cut(" ".join(str(error).split()), 400)) from error
    except (RecursionError, OverflowError, TypeError, KeyError, IndexError) as error:  # e.g. of a base-60 number
        raise ValueError(one_line(error)) from error


class _EachKeyOnce(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML's readers keep the last without a word, and merge keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, of keys that differ."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                raise self._refusal("merge keys (<<) are not read: write out the keys that it stands for", key_node)
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
                seen.add(key)
            except TypeError:
                raise self._refusal(f"found unhashable key {shown(key)}", key_node) from None
            if twice:
                raise self._refusal(f"the key {shown(key)} is given twice", key_node)
        return super().construct_mapping(node, deep)

    @staticmethod
    def _refusal(words: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(None, None, words, node.start_mark)


def _check_depth(text: str) -> None:
    """Refuse a document nested deeper than `DEEPEST`, before it is read level by level."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEEPEST:
                raise ValueError(f"nested more than {DEEPEST} levels deep (line {event.start_mark.line + 1})")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _check_size(root: yaml.Node) -> None:
    """Refuse a document that its aliases make larger than `MOST` values, or that holds itself."""
    sizes: dict[int, int | None] = {}

    def size(node: yaml.Node) -> int:
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ValueError(f"an alias stands for what it is in (line {node.start_mark.line + 1})")
            return known
        sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(map(size, node.value))
        elif isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        sizes[id(node)] = total
        if total > MOST:
            raise ValueError(f"its aliases stand for more than {MOST:,} values (line {node.start_mark.line + 1})")
        return total

    size(root)
