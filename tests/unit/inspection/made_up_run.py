"""A recipe over a blend of two made-up files, and its tokenizer."""

from pathlib import Path

import sentencepiece

RECIPE = """
model:
  vision:
    {kind: internvit, image_size: 28, patch_size: 7, num_layers: 1, hidden_size: 16, ffn_hidden_size: 32,
     num_attention_heads: 2, normalization: LayerNorm, qk_layernorm: false, add_qkv_bias: true}
  connector: {kind: mlp, ffn_hidden_size: 32}
  fusion: {kind: decoder_only}
  language: {num_layers: 10, hidden_size: 32, ffn_hidden_size: 64, num_attention_heads: 4, num_query_groups: 2}
tokenizer: {kind: sentencepiece, path: FOLDER/tokenizer.model}
data:
  train:
    kind: blend
    sources:
      - {dataset: {kind: jsonl, path: FOLDER/chats.jsonl}, name: chats, weight: 1}
      - {dataset: {kind: jsonl, path: FOLDER/documents.jsonl}, name: documents, weight: 1}
  seq_length: 400
  num_workers: 0
engine: {kind: megatron}
training:
  trainable: [vision, connector, cross_attention, language]
  train_iters: 2
  global_batch_size: 4
  micro_batch_size: 2
  optimizer: {lr: 0.001}
checkpoint: {save: FOLDER/run}
"""


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single characters and bytes, with ChatML's symbols."""
    text = folder / "text.txt"
    text.write_text("\n".join(["What is it? Red, green, four.", "before and after <tile_1> far too long"] * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=290,
        byte_fallback=True,
        control_symbols=["<|im_start|>", "<|im_end|>", "<image>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
