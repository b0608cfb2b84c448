"""
The loss of OpenAI's gpt2-large (774M parameters) on OpenWebText.

    python data/openwebtext/prepare.py
    python train.py config/eval_gpt2_large.py

hardware  one GPU
expected  val loss about 2.67 (nanoGPT's figure; OpenWebText is not quite the text that GPT-2 was trained on)
"""
init_from = 'gpt2-large' # n_layer=36, n_head=20, n_embd=1280 come with the weights
batch_size = 8
eval_iters = 500 # many, for a steady figure
eval_only = True
wandb_log = False
