"""A small Llama: a tokenizer made here, training on tinyshakespeare.txt (where there is one), fine-tuning on prompts, and sampling."""

import json
import os
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import lowmem_pnn

FOLDER, FILE = Path(tempfile.mkdtemp()), Path(os.environ.get("LOWMEM_PNN_DATA", "."), "tinyshakespeare.txt")
LINES = "ROMEO:\nBut, soft! what light through yonder window breaks?\n\nJULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\n\n"
text, words, llama = FILE.read_text()[:24_000] if FILE.is_file() else LINES * 100, pre_tokenizers.ByteLevel, FOLDER / "llama"
(FOLDER / "text.txt").write_text(text)
speeches = [speech.split(":\n", 1) for speech in text.split("\n\n") if ":\n" in speech][:48]
rows = [{"prompt": f"{name}:\n", "completion": said} for name, said in speeches]
(FOLDER / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

bpe = Tokenizer(models.BPE())
bpe.pre_tokenizer, bpe.decoder = words(add_prefix_space=False), decoders.ByteLevel()
options = {"vocab_size": 512, "special_tokens": ["<end>", "<pad>"], "initial_alphabet": words.alphabet(), "show_progress": False}
bpe.train_from_iterator([text], trainers.BpeTrainer(**options))
PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<pad>").save_pretrained(llama)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "eos_token_id": 0}
LlamaConfig(vocab_size=512, max_position_embeddings=64, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(llama)

run = {
    "max_gpu_mem": "150MB",
    "device": "cpu",
    "method": "exact",
    "context": 64,
    "batch_size": 8,
    "epochs": 1,
    "data_root": FOLDER,
}
first = lowmem_pnn.fit(f"hf:{llama}", f"text:{FOLDER / 'text.txt'}", workdir=FOLDER / "run-1", lr=5e-3, **run)
second = lowmem_pnn.fit(
    f"hf:{first.transformers_folder}", f"jsonl:{FOLDER / 'chat.jsonl'}", workdir=FOLDER / "run-2", lr=1e-3, **run
)
lowmem_pnn.export(second, to="hf", out=FOLDER / "model")
model, tokenizer = AutoModelForCausalLM.from_pretrained(FOLDER / "model"), AutoTokenizer.from_pretrained(FOLDER / "model")
asked = tokenizer("ROMEO:\n", return_tensors="pt")
said = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked.input_ids.shape[1] :]
assert tokenizer.decode(said, skip_special_tokens=True) == lowmem_pnn.generate(second, "ROMEO:\n", max_new_tokens=20)
print(f"plain PyTorch, same weights: ROMEO says {tokenizer.decode(said)!r}")
