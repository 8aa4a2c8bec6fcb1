"""What a planted bug is: a sentence, and an exact replacement of text in one file."""

from pathlib import Path, PurePosixPath
from typing import NamedTuple


class Bug(NamedTuple):
    """The text `old`, which stands exactly once in `file`, becomes `new`."""

    name: str  # side.component.what, such as ref.attention.scale_by_width
    sentence: str
    file: str  # from the root of the project
    old: str
    new: str
    killed_by: str  # the component's own test file, which has to fail

    def plant(self, root: Path) -> None:
        """Writes the bug into the tree. Raises ValueError where `old` does not stand there exactly once."""
        path = root / self.file
        text = path.read_text(encoding="utf-8")
        if (found := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: its text stands {found} times in {self.file}, not once")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


def bugs(file: str, *described: tuple[str, str, str, str], killed_by: str = "") -> list[Bug]:
    """Bugs of one file, each (what, sentence, old, new), killed by the test of the file's own name."""
    path = PurePosixPath(file)
    side = {"ref_numpy": "ref", "torch_impl": "torch"}[path.parts[0]]
    test = killed_by or f"parity_tests/test_{path.stem}.py"
    return [
        Bug(f"{side}.{path.stem}.{what}", sentence, file, old, new, test)
        for what, sentence, old, new in described
    ]
