"""
The loss of OpenAI's gpt2-medium (350M parameters) on OpenWebText.

    python data/openwebtext/prepare.py
    python train.py config/eval_gpt2_medium.py

hardware  one GPU
expected  val loss about 2.84 (nanoGPT's figure; OpenWebText is not quite the text that GPT-2 was trained on)
"""
init_from = 'gpt2-medium' # n_layer=24, n_head=16, n_embd=1024 come with the weights
batch_size = 8
eval_iters = 500 # many, for a steady figure
eval_only = True
wandb_log = False
