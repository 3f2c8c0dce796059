"""GGUF files as sources: header, block formats, families and their names, tokenizer; ``checkpoint`` joins them."""
