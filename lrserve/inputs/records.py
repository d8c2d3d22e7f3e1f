"""Records become texts: which column holds them, and conversations through the model's chat template."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from lrserve.errors import InputError
from lrserve.inputs.formats import Table

_TEXT: Final = "text"
_CHATS: Final = ("messages", "conversations")
_ALPACA: Final = ("instruction", "output")
_ROLES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
"""By who speaks in ShareGPT's form, the role of a message."""
_DAY: Final = datetime.datetime(2024, 7, 26)
"""What templates take for today, so that a run that goes on tomorrow has the same text."""
_SHOWN: Final = 200  # characters of a list of columns, or of another program's message


def texts_of(table: Table, column: str | None, origin: str, tokenizer: Any) -> tuple[list[str], int]:
    """Return the texts of records, and how many records have none (null).

    Args:
        table: the records.
        column: where their texts are; None takes `text`, else `messages` or `conversations`.
        origin: what the user called them.
        tokenizer: the model's, for its chat template; None refuses conversations.

    Raises:
        InputError: there is no such column, or a record without text in it.
    """
    found = list(each_text(table, column, origin, tokenizer))
    texts = [text for text in found if text is not None]
    return texts, len(found) - len(texts)


def each_text(table: Table, column: str | None, origin: str, tokenizer: Any) -> Iterator[str | None]:
    """Yield the text of each record, or None for one that has none; otherwise as `texts_of`."""
    column = column or _default_column(table, origin)
    if column not in table.columns:
        raise InputError(f"{origin}: there is no column {column!r}; there are {_names(table)}")
    for place, value in table.values(column):
        if value is None or (isinstance(value, str) and column not in _CHATS):
            yield value
        elif isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            yield _conversation(value, tokenizer, f"{origin} {place}")
        else:
            wanted = "a list of messages" if column in _CHATS else "text"
            raise InputError(
                f"{origin} {place}: {column!r} is {type(value).__name__}, not {wanted}; fix it, or name another column"
            )


def _default_column(table: Table, origin: str) -> str:
    found = next((name for name in (_TEXT, *_CHATS) if name in table.columns), None)
    if found is not None:
        return found
    if not table.columns:
        raise InputError(f"{origin} holds no records; give a file or dataset with some")
    alpaca = set(_ALPACA) <= set(table.columns)
    form = " (Alpaca's form: join them into one text, or write them as messages)" if alpaca else ""
    name = _ALPACA[1] if alpaca else table.columns[-1]
    raise InputError(
        f"{origin} has no column {_TEXT!r}, {_CHATS[0]!r} or {_CHATS[1]!r}, but {_names(table)}{form}; name the one to read, as in "
        f"FILE:{name} or, of a dataset, NAME:CONFIG:SPLIT:{name}"
    )


def _names(table: Table) -> str:
    shown = ", ".join(map(repr, table.columns))
    return shown if len(shown) <= _SHOWN else shown[:_SHOWN] + "..."


def _conversation(entries: Sequence[Any], tokenizer: Any, place: str) -> str:
    """Render the messages of a conversation as the model sees them when it is served."""
    messages = [_message(entry, place) for entry in entries]
    if tokenizer is None or not tokenizer.chat_template:
        raise InputError(
            f"{place} is a conversation, and the model's tokenizer has no chat template; put a chat_template.jinja beside it, or "
            "give conversations as text"
        )
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, strftime_now=_DAY.strftime))
    except Exception as error:  # a template is a program of the model's author: it raises what it likes
        reason = " ".join(str(error).split())[:_SHOWN] or type(error).__name__
        raise InputError(f"{place}: the model's chat template refuses the conversation: {reason}; fix or remove it") from None


def _message(entry: Any, place: str) -> dict[str, Any]:
    """Return a message of either form as role and content."""
    if isinstance(entry, Mapping) and isinstance(entry.get("from"), str) and isinstance(entry.get("value"), str):
        role = _ROLES.get(entry["from"].lower())
        if role is None:
            raise InputError(f"{place}: nobody knows who speaks as {entry['from'][:40]!r}; name one of {', '.join(_ROLES)}")
        return {"role": role, "content": entry["value"]}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("role"), str) or "content" not in entry:
        raise InputError(
            f"{place} is a list, but not of messages with 'role' and 'content', or 'from' and 'value'; fix or remove it"
        )
    return {**{key: value for key, value in entry.items() if value is not None}, "content": _content(entry["content"], place)}


def _content(content: Any, place: str) -> str | None:
    """Return what a message says: None where it calls tools alone; parts of text are joined."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) else [content]
    if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in parts):
        raise InputError(f"{place}: a message holds more than text (such as images), which lrserve does not read; remove it")
    return "".join(part["text"] for part in parts)
