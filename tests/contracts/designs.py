"""What every type of design must do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tiltopt.designs import DesignType


class DesignContract:
    """Inherit, and say what is tried.

    def kind(self): the type. def events(self): (n, *event), what a prior might decode, n >= 3, no two alike.
    """

    def kind(self) -> DesignType:
        raise NotImplementedError

    def events(self) -> torch.Tensor:
        raise NotImplementedError

    @staticmethod
    def same(a: Any, b: Any) -> bool:
        """Whether two designs are the same, with type and size."""
        x, y = np.asarray(a), np.asarray(b)
        return type(a) is type(b) and x.dtype == y.dtype and x.shape == y.shape and bool((x == y).all())

    def test_a_design_is_what_its_events_say_and_says_them_again(self) -> None:
        kind, events = self.kind(), self.events()
        designs = kind.of(events)
        assert len(designs) == len(events)
        again = kind.events(designs)
        assert again.dtype == torch.float32
        assert again.shape == events.shape
        assert all(self.same(a, b) for a, b in zip(kind.of(again), designs, strict=True))
        alone = [kind.of(event[None])[0] for event in events]
        assert all(self.same(a, b) for a, b in zip(alone, designs, strict=True))

    def test_a_file_holds_it_whole(self) -> None:
        kind = self.kind()
        for design in kind.of(self.events()):
            assert np.array_equal(np.asarray(kind.load(kind.dump(design))), np.asarray(design))
        contents = {kind.dump(design) for design in kind.of(self.events())}
        assert len(contents) == len(self.events())

    @pytest.mark.parametrize("content", [b"", b"no design", b'{"a": 1}', b"\x93NUMPY\x01\x00", b"\xff\xfe"])
    def test_what_holds_none_is_refused(self, content: bytes) -> None:
        with pytest.raises(ValueError, match=r".+"):
            self.kind().load(content)

    def test_a_cut_file_is_refused(self) -> None:
        kind = self.kind()
        content = kind.dump(kind.of(self.events())[0])
        with pytest.raises(ValueError, match=r".+"):
            kind.load(content[: len(content) // 2])

    def test_it_has_a_picture_of_its_own(self) -> None:
        kind = self.kind()
        views = [kind.view(design) for design in kind.of(self.events())]
        assert all(isinstance(view, Image.Image) and view.mode == "RGB" and min(view.size) >= 8 for view in views)
        assert len({view.tobytes() for view in views}) == len(views)

    def test_a_cell_of_a_table_holds_it_or_it_says_that_none_can(self) -> None:
        kind = self.kind()
        for design in kind.of(self.events()):
            if kind.written:
                assert self.same(kind.parse(kind.text(design)), design)
            else:
                with pytest.raises(TypeError, match="not written as text"):
                    kind.text(design)
