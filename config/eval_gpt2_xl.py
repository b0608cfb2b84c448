"""
The loss of OpenAI's gpt2-xl (1558M parameters) on OpenWebText.

    python data/openwebtext/prepare.py
    python train.py config/eval_gpt2_xl.py

hardware  one GPU
expected  val loss about 2.54 (nanoGPT's figure; OpenWebText is not quite the text that GPT-2 was trained on)
"""
init_from = 'gpt2-xl' # n_layer=48, n_head=25, n_embd=1600 come with the weights
batch_size = 8
eval_iters = 500 # many, for a steady figure
eval_only = True
wandb_log = False
