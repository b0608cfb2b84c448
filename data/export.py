"""
A checkpoint of train.py as a folder that transformers loads: safetensors, config.json and tokenizer files.

    python data/export.py out-shakespeare-char some/folder

GPT2LMHeadModel.from_pretrained('some/folder') is then the same model, and so is --init_from=some/folder here.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1])) # the repository, from any folder
from data.bins import make_folder
from data.run import how_read, read_checkpoint
from data.text import gpt2_files
from model import GPT, TRANSPOSED


def hf_model(model, meta):
    """The GPT as transformers' GPT2LMHeadModel; biases that it does not have become zeros there."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    n_tokens = len(meta['itos']) if 'itos' in meta else c.vocab_size if 'encoding' in meta else 50257
    end = 50256 if n_tokens == 50257 else None # <|endoftext|>
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function='gelu' if c.gelu == 'none' else 'gelu_new', resid_pdrop=c.dropout, embd_pdrop=c.dropout,
        attn_pdrop=c.dropout, bos_token_id=end, eos_token_id=end, nanogpt_bias=c.bias)
    with torch.device('meta'):
        hf = GPT2LMHeadModel(config)
    ours = model.state_dict()
    weights = {}
    for name, wanted in hf.state_dict().items():
        t = ours[name] if name in ours else torch.zeros(wanted.shape)
        weights[name] = t.t().contiguous() if name.endswith(TRANSPOSED) else t
    hf.load_state_dict(weights, assign=True)
    hf.tie_weights()
    hf.generation_config.bos_token_id = hf.generation_config.eos_token_id = end
    if n_tokens < c.vocab_size: # a padded vocabulary: ids that belong to no token are never written
        hf.generation_config.suppress_tokens = list(range(n_tokens, c.vocab_size))
    return hf


def hf_tokenizer(meta, block_size):
    """The tokenizer of the training data in transformers' form."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast
    if 'stoi' in meta: # a BPE without merges: every character is a token
        characters = Tokenizer(models.BPE(vocab=dict(meta['stoi']), merges=[]))
        characters.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=characters, model_max_length=block_size)
    if meta.get('encoding', 'gpt2') != 'gpt2':
        return None
    files = gpt2_files()
    return GPT2TokenizerFast(str(files['encoder.json']), str(files['vocab.bpe']), model_max_length=block_size)


def main(out_dir, folder):
    checkpoint = read_checkpoint(Path(out_dir, 'ckpt.pt'))
    meta = how_read(checkpoint)
    try:
        model = GPT.from_checkpoint(checkpoint)
        make_folder(folder) # save_pretrained would only warn of a file there
        hf_model(model, meta).save_pretrained(folder)
    except (ValueError, OSError) as e:
        sys.exit(f"{out_dir} -> {folder}: {e}")
    tokenizer = hf_tokenizer(meta, model.config.block_size)
    if tokenizer is None:
        print(f"no tokenizer files: transformers has no form of tiktoken's {meta['encoding']!r}")
    else:
        tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.get_num_params() / 1e6:.2f}M parameters, vocab_size {model.config.vocab_size:,}, "
          f"{'exact' if model.config.gelu == 'none' else 'tanh'} GELU")


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit("python data/export.py OUT_DIR FOLDER: a train.py out_dir, and where the model goes")
    main(*sys.argv[1:])
