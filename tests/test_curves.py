"""What data/curves.py says of runs: on logs whose losses are known, and on a run of train.py's."""
import csv
import re
import runpy
from pathlib import Path

import pytest
from conftest import ROOT, TINY, assert_refused

from data.run import RunLog, machine


def write_log(out_dir, losses=(), evaluations=(), where='one H100, torch 2, commit abc'):
    """A folder as train.py leaves it: losses by step, evaluations (step, val loss, seconds)."""
    Path(out_dir).mkdir(parents=True)
    with open(Path(out_dir, 'log.csv'), 'w', newline='') as f:
        log = csv.DictWriter(f, RunLog.FIELDS)
        log.writeheader()
        log.writerows({'step': step, 'loss': loss, 'elapsed_s': 10 + step} for step, loss in enumerate(losses))
        log.writerows({'step': step, 'val_loss': loss, 'elapsed_s': seconds} for step, loss, seconds in evaluations)
    Path(out_dir, 'machine.txt').write_text(f'step 0: {where}\n')


@pytest.fixture
def curves(tmp_path, monkeypatch, run_here):
    """The command, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: run_here('data/curves.py', *flags)


def row(ran, start):
    """The cells of the row of a table that begins with this."""
    line, = (line for line in ran.out.splitlines() if line.startswith(f'| {start} |'))
    return [cell.strip() for cell in line.split('|')[2:-1]]


def test_the_best_val_loss_of_each_seed_stands_there_with_its_median_step_and_time(curves):
    for seed, low in enumerate((1.48, 1.46, 1.47)):
        write_log(f'a{seed}', evaluations=[(0, 4.2, 5), (250, 1.6, 9), (500, low, 13.4), (750, 1.5, 17)])
    ran = curves('ours=a0,a1,a2', '--goal=1.475')
    assert ran.status == 0, ran
    assert row(ran, 'ours') == ['1.4800 (step 500, 13 s); 1.4600 (step 500, 13 s); 1.4700 (step 500, 13 s)', '1.4700',
                                'never; 13.4 s (step 500); 13.4 s (step 500)', '-']
    assert 'one H100, torch 2, commit abc.' in ran.out
    ran = curves('ours=a0,a1,a2', '--goal=1.6')
    assert row(ran, 'ours')[3] == '9.0 s'


def test_groups_differ_by_their_mean_and_largest_window_beside_what_two_seeds_differ_by(curves):
    write_log('a0', [2.0] * 40)
    write_log('a1', [2.5] * 40)
    write_log('b0', [2.01] * 20 + [2.0, 2.06] * 10) # its windows are 0.01 and 0.03 above a0's
    write_log('b1', [2.5] * 40)
    ran = curves('plain=a0,a1', 'fast=b0,b1')
    assert ran.status == 0, ran
    assert row(ran, 'plain and fast, same seed') == ['2', '0.0100', '0.0300']
    assert row(ran, 'two seeds of plain') == ['1', '0.5000', '0.5000']
    assert row(ran, 'two seeds of fast') == ['1', '0.4800', '0.4900']
    assert 'best val' not in ran.out # these runs were not evaluated


def test_a_window_that_a_run_did_not_finish_is_left_out(curves):
    write_log('a', [2.0] * 43)
    write_log('b', [2.0] * 40 + [9.0] * 3)
    assert row(curves('a', 'b'), 'a and b, same seed') == ['1', '0.0000', '0.0000']


def test_the_picture_has_a_colour_a_group_and_a_line_a_seed(curves, monkeypatch):
    from matplotlib import pyplot
    for name in ('a0', 'a1', 'b0', 'b1'):
        write_log(name, [2.0] * 60, [(0, 2.1, 3), (40, 2.0, 30)])
    kept = []
    monkeypatch.setattr(pyplot, 'close', lambda *_: None)
    subplots = pyplot.subplots
    monkeypatch.setattr(pyplot, 'subplots', lambda *a, **k: kept.append(subplots(*a, **k)) or kept[-1])
    ran = curves('plain=a0,a1', 'fast=b0,b1', '--out=both.png', '--title=Both')
    assert ran.status == 0 and Path('both.png').read_bytes().startswith(b'\x89PNG')
    (_, (by_step, by_time)), = kept
    for axes in (by_step, by_time):
        colours = [line.get_color() for line in axes.lines]
        assert len(colours) == 8 and colours.count('C0') == colours.count('C1') == 4 # batches and val of each
    assert [text.get_text() for text in by_step.get_legend().get_texts()] == ['plain', 'fast']
    assert by_step.get_title() == 'Both'
    assert list(by_step.lines[1].get_xdata()) == [0, 40] and list(by_time.lines[1].get_xdata()) == [3, 30]


@pytest.fixture
def readme(tmp_path, monkeypatch):
    """A README.md of our own in the place of the repository's."""
    path = tmp_path / 'README.md'
    path.write_text("before\n<!-- curves chars begin -->\nold\n<!-- curves chars end -->\nafter\n")

    def main(*argv):
        names = runpy.run_path(str(ROOT / 'data' / 'curves.py'))
        monkeypatch.setitem(names['main'].__globals__, 'ROOT', tmp_path)
        names['main'](list(argv))
    monkeypatch.chdir(tmp_path)
    return path, main


def test_table_machine_and_picture_go_into_their_section_of_the_readme_and_nothing_else_changes(readme):
    path, main = readme
    write_log('a', [2.0] * 40, [(0, 2.0, 5)], where='one H100, torch 2, commit unknown')
    for _ in range(2): # the second time it replaces what the first wrote
        main('plain=a', '--readme=chars', '--commit=1234567', '--out=pictures.png')
        text = path.read_text()
        assert re.fullmatch(r'before\n<!-- curves chars begin -->\n\| .*<!-- curves chars end -->\nafter\n', text,
                            re.DOTALL)
        assert '| plain | 2.0000 (step 0, 5 s) | 2.0000 |' in text and 'old' not in text
        assert 'On one H100, torch 2, commit 1234567.' in text and text.count('](pictures.png)') == 1


def test_a_readme_without_the_section_is_left_as_it_is(readme, capsys):
    path, main = readme
    write_log('a', [2.0] * 40)
    before = path.read_text()
    with pytest.raises(SystemExit, match='README.md must hold the lines <!-- curves gpt2 begin --> and '):
        main('plain=a', '--readme=gpt2', '--out=x.png')
    assert path.read_text() == before


@pytest.mark.parametrize('arguments, words', [
    ([], 'which runs?'),
    (['plain=nowhere'], 'nowhere/log.csv: No such file or directory'),
    (['a', '--colour=red'], '--colour=red: write one of --out=...'),
    (['a', '--goal=low'], "--goal must be a loss, like 1.475, not 'low'"),
    (['x=a', 'x=b'], "x=b: there is a group 'x' already"),
    (['x=a,'], 'x=a,: a group is NAME=out_dir[,out_dir...]'),
    (['x=a,b', 'y=a'], "the same seeds in the same order, but they hold {'x': 2, 'y': 1} runs"),
    (['x=text'], 'text/log.csv: not a log of train.py'),
    (['x=empty'], 'empty/log.csv: no loss there yet'),
    (['a', '--out=nowhere/loss.png'], '--out=nowhere/loss.png: No such file or directory'),
    (['a', '--out=loss.xyz'], '--out=loss.xyz: '),
])
def test_a_mistake_is_one_line(arguments, words, curves):
    write_log('a', [2.0] * 20)
    write_log('b', [2.0] * 20)
    write_log('empty')
    Path('text').mkdir()
    Path('text/log.csv').write_text('step,loss\n1,two\n')
    assert_refused(curves(*arguments), words)


def test_a_run_of_train_py_is_read_with_the_machine_it_ran_on(tiny, run_here):
    assert run_here('train.py', *TINY, '--out_dir=first').status == 0
    assert run_here('train.py', *TINY, '--out_dir=first', '--init_from=resume', '--max_iters=12').status == 0
    assert Path('first/machine.txt').read_text() == f'step 0: {machine()}\nstep 8: {machine()}\n'
    ran = run_here('data/curves.py', 'first')
    with open('first/log.csv', newline='') as f:
        evaluations = [(float(r['val_loss']), int(r['step'])) for r in csv.DictReader(f) if r['val_loss']]
    loss, step = min(evaluations)
    assert len(evaluations) == 4 and row(ran, 'first')[0].startswith(f'{loss:.4f} (step {step}, ')
    assert f'On {machine()}.' in ran.out and 'torch ' in machine() and 'commit ' in machine()
    assert Path('loss.png').exists()
