import io

from rich.console import Console

from learnables.recipes.vit.progress import Bar


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, highlight=False)


def test_terminal_shows_epoch_loss_accuracy_and_time_and_gets_its_cursor_back():
    out = console(terminal=True)
    with Bar(steps=100, done=0, epochs=5, console=out) as bar:
        bar.step(40, 1.234)
        bar.epoch(2, 0.876)
    text = out.file.getvalue()
    for part in ("epoch 2/5", "40/100", "loss 1.234", "test 87.60%"):
        assert part in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_pipe_gets_plain_lines_with_the_last_epoch_among_them():
    out = console(terminal=False)
    with Bar(steps=10, done=0, epochs=2, console=out) as bar:
        bar.step(5, 0.5)
        bar.epoch(1, 0.5)
        bar.step(10, 0.25)
        bar.epoch(2, 0.75)
    lines = out.file.getvalue().splitlines()
    assert lines[-1] == "epoch 2/2  loss 0.250  test 75.00%"
    assert "\x1b" not in out.file.getvalue()
