"""StopWatcher against the plain way: decode everything after every token and look."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch.backends.stop_strings import StopWatcher

TEXT = st.text(st.sampled_from("ab c.\n<|é漢🦙🏽\u200d0"), max_size=120)


def plain_find(decode, output, stop):
    for end in range(1, len(output) + 1):
        text = decode(output[:end])
        places = [text.find(s) for s in stop if s in text]
        if places:
            return end, text[: min(places)]
    return None


def watched_find(decode, output, stop, **settings):
    watcher = StopWatcher(decode, stop)
    for name, value in settings.items():
        setattr(watcher, name, value)
    for end in range(1, len(output) + 1):
        text = watcher.find(output[:end])
        if text is not None:
            return end, text
    return None


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_same_as_decoding_everything(tokenizer, data):
    text = data.draw(TEXT)
    cut = st.tuples(st.integers(0, max(len(text) - 1, 0)), st.integers(1, 6)).map(lambda c: text[c[0] : c[0] + c[1]])
    stop = tuple(s for s in data.draw(st.lists(cut | TEXT, min_size=1, max_size=3)) if s) or ("x",)
    special = data.draw(st.lists(st.sampled_from([None, 2050, 3000]), max_size=4))
    output = tokenizer.encode(text)
    for token in special:  # tokens without text in between
        if token is not None:
            output.insert(data.draw(st.integers(0, len(output))), token)
    shorten_at = data.draw(st.sampled_from([4, 10, 1000]))
    needed = max(map(len, stop)) + 3
    found = watched_find(tokenizer.decode, output, stop, _shorten_at=shorten_at, _needed_chars=needed)
    assert found == plain_find(tokenizer.decode, output, stop)


def test_a_character_in_pieces_is_found_when_it_is_whole(tokenizer):
    output = tokenizer.encode("go 🦙 on")
    assert len(output) > len("go 🦙 on") - 3  # the llama is several byte tokens
    end, text = watched_find(tokenizer.decode, output, ("🦙",))
    assert text == "go " and "\ufffd" in tokenizer.decode(output[: end - 1])


def test_the_tail_stays_short(tokenizer):
    decoded = []

    def decode(ids):
        decoded.append(len(ids))
        return tokenizer.decode(ids)

    watcher = StopWatcher(decode, ("never this",))
    output = tokenizer.encode("some words of text " * 400)
    for end in range(1, len(output) + 1):
        assert watcher.find(output[:end]) is None
    assert len(output) > 1000 and max(decoded) <= 2 * watcher._needed_chars
