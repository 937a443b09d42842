"""The conversation of `nibble chat`: what is typed, which is a message or a command, and what was said so far.

An answer that was stopped is forgotten together with its question.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path

from .chat import Backend, Messages, answer

HELP = """\
/system TEXT   says who the model is, from now on; without TEXT what it was told
/model         which model answers
/retry         the last message again
/clear         forgets the conversation
/save FILE     writes it, as JSON
/speed         whether each answer's speed is told
/exit, Ctrl-D  ends. Ctrl-C stops an answer. Alt-Enter breaks the line, the arrows bring earlier messages back"""
HISTORY = Path("~/.cache/nibble/chat_history")


class Conversation:
    """Turns until the input ends."""

    def __init__(self, runner: asyncio.Runner, backend: Backend, system: str | None):
        self.runner, self.backend, self.system = runner, backend, system or ""
        self.messages: Messages = []
        self.tells_speed = True
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _tell(HELP),
            "/system": self._system,
            "/model": lambda _: _tell(self.backend.model),
            "/retry": self._retry,
            "/clear": lambda _: self.messages.clear(),
            "/save": self._save,
            "/speed": self._speed,
        }

    def run(self) -> None:
        """Read, do, until the end."""
        read = _reader()
        if sys.stdin.isatty():
            _tell("/help says what can be typed")
        while True:
            try:
                line = read().strip()
            except EOFError:
                return
            if line in ("/exit", "/quit"):
                return
            self.take(line)

    def take(self, line: str) -> None:
        """What one line asks for. An unknown command is told; a message that begins with / has a space before it."""
        if not line:
            return
        name, _, rest = line.partition(" ")
        if not line.startswith("/"):
            self._say(line)
        elif name in self.commands:
            self.commands[name](rest.strip())
        else:
            _tell(f"there is no {name}; /help says what there is")

    def _say(self, text: str) -> None:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        turn = [*self.messages, {"role": "user", "content": text}]
        try:
            said = self.runner.run(answer(self.backend, [*opening, *turn], self.tells_speed))
        except KeyboardInterrupt:
            _tell("\n[stopped]")
            return
        self.messages = [*turn, {"role": "assistant", "content": said}]

    def _retry(self, _: str) -> None:
        if not self.messages:
            _tell("nothing was said yet")
            return
        *self.messages, last, _answered = self.messages
        self._say(last["content"])

    def _system(self, text: str) -> None:
        if text:
            self.system = text
        _tell(f"system: {self.system or 'nothing'}")

    def _save(self, file: str) -> None:
        opening = [{"role": "system", "content": self.system}] if self.system else []
        try:
            text = json.dumps([*opening, *self.messages], ensure_ascii=False, indent=2)
            Path(file or "conversation.json").expanduser().write_text(text + "\n")
        except OSError as error:
            _tell(f"not saved: {error}")

    def _speed(self, _: str) -> None:
        self.tells_speed = not self.tells_speed
        _tell(f"speed is {'told' if self.tells_speed else 'not told'}")


def _tell(text: str) -> None:
    print(text, file=sys.stderr)


def _reader() -> Callable[[], str]:
    """Reads a message: on a terminal with editing and history, else a line."""
    if not sys.stdin.isatty():
        return lambda: input("")
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()
    bindings.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    file = HISTORY.expanduser()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history: FileHistory | InMemoryHistory = FileHistory(str(file))
    except OSError:
        history = InMemoryHistory()
    session: PromptSession[str] = PromptSession("> ", history=history, key_bindings=bindings)

    def read() -> str:
        try:
            return session.prompt()
        except KeyboardInterrupt:  # of a line that is half written: forget it
            return ""

    return read
