"""Language data: text as tokens of any tokenizer, made once and mapped, in rows of one length for a model."""
