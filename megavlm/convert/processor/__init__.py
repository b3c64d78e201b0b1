"""What a published folder needs beside weights and ``config.json``: tokenizer, chat template, processor."""

from megavlm.convert.processor.processor_files import PROCESSOR_FILES, stop_token_ids, write_processor

__all__ = ["PROCESSOR_FILES", "stop_token_ids", "write_processor"]
