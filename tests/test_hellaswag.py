"""HellaSwag's scores are those of transformers' model, question by question."""
import json

import pytest
import torch
from conftest import assert_refused, run_script

WORDS = "a man a dog the river runs over under quickly and then it stops here".split()
N = 24


@pytest.fixture
def questions(tmp_path):
    rng, lines = torch.Generator().manual_seed(3), []
    for _ in range(N):
        def words(n):
            return ' '.join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=rng))
        lines.append({'ctx': words(7), 'endings': [words(int(n)) for n in torch.randint(1, 9, (4,), generator=rng)],
                      'label': str(int(torch.randint(4, (1,), generator=rng)))})
    path = tmp_path / 'questions.jsonl'
    path.write_text('\n'.join(map(json.dumps, lines)))
    return path, lines


def test_accuracy_is_that_of_transformers_scores(questions, tmp_path, gpt2_tokens):
    from transformers import GPT2Config, GPT2LMHeadModel

    from data.text import gpt2_encoding
    path, lines = questions
    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3)).eval()
    hf.save_pretrained(tmp_path / 'hf')
    encode, right = gpt2_encoding().encode, {'acc': 0, 'acc_norm': 0}
    for line in lines:
        sums, means = [], []
        for ending in line['endings']:
            context, end = encode(line['ctx']), encode(' ' + ending)
            ids = torch.tensor([context + end])
            with torch.no_grad():
                log_p = hf(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[-len(end):]
            sums.append(-log_p.sum().item())
            means.append(-log_p.mean().item())
        for name, losses in (('acc', sums), ('acc_norm', means)):
            right[name] += losses.index(min(losses)) == int(line['label'])
    assert right['acc'] != right['acc_norm'] # else the two could be mixed up unseen
    ran = run_script('data/hellaswag/evaluate.py', f"--init_from={tmp_path / 'hf'}", f'--data_file={path}',
                     '--batch_size=4', '--device=cpu', '--dtype=float32')
    assert ran.status == 0, ran.err
    found = json.loads(ran.out.splitlines()[-1])
    assert found['questions'] == N
    assert {name: found[name] for name in right} == {name: round(n / N, 4) for name, n in right.items()}


def test_a_text_longer_than_the_context_loses_its_beginning_and_an_empty_context_its_first_token(tmp_path, gpt2_tokens):
    from transformers import GPT2Config, GPT2LMHeadModel
    path = tmp_path / 'questions.jsonl'
    path.write_text('\n'.join(json.dumps({'ctx': context, 'endings': ['went home'] * 3 + ['and sang ' * 9], 'label': 3})
                              for context in ('', 'a man')))
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=8)).save_pretrained(tmp_path / 'hf')
    flags = [f"--init_from={tmp_path / 'hf'}", f'--data_file={path}', '--device=cpu']
    ran = run_script('data/hellaswag/evaluate.py', *flags)
    assert ran.status == 0 and json.loads(ran.out.splitlines()[-1])['questions'] == 2, ran.err
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99)).save_pretrained(tmp_path / 'hf')
    assert_refused(run_script('data/hellaswag/evaluate.py', *flags), 'question 1 and on: token', 'vocab_size=99')


def test_a_spoiled_question_is_named_with_its_line(questions, tmp_path):
    path, lines = questions
    path.write_text('\n'.join([json.dumps(lines[0]), '{"ctx": "a man", "endings": ["a"]}']))
    ran = run_script('data/hellaswag/evaluate.py', f'--data_file={path}', '--init_from=gpt2')
    assert_refused(ran, str(path), 'line 2', 'four endings')
