"""
The loss of OpenAI's gpt2 (124M parameters) on OpenWebText.

    python data/openwebtext/prepare.py
    python train.py config/eval_gpt2.py

hardware  one GPU
expected  val loss about 3.12 (nanoGPT's figure; OpenWebText is not quite the text that GPT-2 was trained on)
"""
init_from = 'gpt2' # n_layer=12, n_head=12, n_embd=768 come with the weights
batch_size = 8
eval_iters = 500 # many, for a steady figure
eval_only = True
wandb_log = False
