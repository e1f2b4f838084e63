"""Search: the most probable sequences of models that go step by step."""

from fastrnn.search.beam_search import BeamResult, Shared, beam_search, expand

__all__ = ["BeamResult", "Shared", "beam_search", "expand"]
