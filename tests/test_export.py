"""A checkpoint leaves for transformers and comes back."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
CHARS = sorted("\n abcdefghij")


def checkpoint_in(folder, tokenizer, **changes):
    torch.manual_seed(1)
    args = dict(block_size=16, vocab_size=len(CHARS), n_layer=2, n_head=2, n_embd=32, dropout=0.1, bias=False)
    model = GPT(GPTConfig(**{**args, **changes}))
    with torch.no_grad(): # as after training: no parameter at its initial value
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    folder.mkdir()
    torch.save({'model': model.state_dict(), 'model_args': model.config.model_args(), 'gelu': model.config.gelu,
                'tokenizer': tokenizer, 'iter_num': 1, 'best_val_loss': 1.0, 'config': {}}, folder / 'ckpt.pt')
    return model.eval()


def export(out_dir, folder):
    return subprocess.run([sys.executable, 'data/export.py', str(out_dir), str(folder)], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)


def same_greedy_tokens(model, hf, prompt, n_tokens=None, n=10):
    idx = torch.tensor([prompt])
    ours = model.generate(idx, n, temperature=0, n_tokens=n_tokens)
    theirs = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=n, do_sample=False, pad_token_id=0,
                         eos_token_id=None)
    return torch.equal(ours, theirs)


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('gelu', ['none', 'tanh'])
def test_an_exported_model_writes_the_same_tokens_and_comes_back_bit_for_bit(tmp_path, bias, gelu):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    meta = {'vocab_size': len(CHARS), 'stoi': {c: i for i, c in enumerate(CHARS)}, 'itos': dict(enumerate(CHARS))}
    model = checkpoint_in(tmp_path / 'out', meta, bias=bias, gelu=gelu)
    done = export(tmp_path / 'out', tmp_path / 'hf')
    assert done.returncode == 0, done.stderr
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    assert same_greedy_tokens(model, hf, [1, 2, 3])
    back = GPT.from_pretrained(str(tmp_path / 'hf')).eval()
    assert back.config.bias == bias and back.config.gelu == gelu
    ours, again = model.state_dict(), back.state_dict()
    assert ours.keys() == again.keys() and all(torch.equal(ours[k], again[k]) for k in ours)
    text = "bad\nface  hid"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    assert tokenizer(text)['input_ids'] == [CHARS.index(c) for c in text]
    assert tokenizer.decode(tokenizer(text)['input_ids']) == text


def test_ids_of_a_padded_vocabulary_are_never_written(tmp_path, gpt2_tokens):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = checkpoint_in(tmp_path / 'out', {}, vocab_size=50304, n_layer=1, n_embd=8)
    with torch.no_grad(): # a model that likes a padded id best
        model.lm_head.weight[50300] = 0
        likes = model.transformer.ln_f.weight * torch.ones(8)
        model.lm_head.weight[50300] += likes * 100
    torch.save({**torch.load(tmp_path / 'out/ckpt.pt'), 'model': model.state_dict()}, tmp_path / 'out/ckpt.pt')
    done = export(tmp_path / 'out', tmp_path / 'hf')
    assert done.returncode == 0, done.stderr
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / 'hf')
    prompt = tokenizer("To be, or not to be")['input_ids']
    assert prompt == [2514, 307, 11, 393, 407, 284, 307]
    assert same_greedy_tokens(model, hf, prompt, n_tokens=50257)
    written = hf.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=True, top_k=0, pad_token_id=0)
    assert written.max() < 50257


def test_a_missing_checkpoint_is_one_line(tmp_path):
    done = export(tmp_path, tmp_path / 'hf')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'no checkpoint there' in done.stderr


def test_a_file_where_the_folder_should_go_is_one_line(tmp_path):
    checkpoint_in(tmp_path / 'out', {}, vocab_size=8, n_layer=1, n_embd=8)
    (tmp_path / 'hf').touch()
    done = export(tmp_path / 'out', tmp_path / 'hf')
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and 'hf: File exists' in done.stderr
