"""The commands `models`, `data` and `methods`: what there is, with a line each."""

import json
from collections.abc import Mapping

import click

from lowmem_pnn.cli.options import output_options
from lowmem_pnn.cli.output import print_result

MODELS: Mapping[str, str] = {
    "mlp:784-256-10": "a multilayer perceptron with ReLU, of these widths",
    "gpt:layers=12,width=768,heads=12,context=256": "a pre-norm decoder for text",
    "cifar-resnet18": "ResNet-18 for 32x32 images; --model-arg width=0.25 for a quarter of the channels",
    "cifar-vgg11": "VGG-11 for 32x32 images",
    "cifar-vgg16": "VGG-16 for 32x32 images",
    "cifar-mobilenetv2": "MobileNetV2 for 32x32 images",
    "resnet50": "any classifier of torchvision by its name (--all lists them); --weights default for pretrained ones",
    "timm:NAME": "any network of timm (pip install 'lowmem-pnn[timm]')",
    "hf:FOLDER|NAME": "a model of transformers (pip install 'lowmem-pnn[hf]')",
    "package.module:factory": "what a function of yours returns, from a module that can be imported",
    "file.py:factory": "what a function of yours returns, from a file",
}

DATA: Mapping[str, str] = {
    "digits": "1,797 grey images of 8x8, from scikit-learn; no download",
    "mnist, fashion-mnist, emnist-balanced": "grey images of 28x28, downloaded by torchvision to --data-root",
    "cifar10, cifar100": "colour images of 32x32, downloaded by torchvision to --data-root",
    "imagefolder:DIR": "a folder for each class, or train, val and test with such; --image-size brings images to one size",
    "segmentation:DIR": "folders images and masks, or train, val and test with such",
    "npz:FILE": "arrays x_train, y_train and x_test, y_test, x_val, y_val; or x and y",
    "csv:FILE, parquet:FILE": "tables with a column --target",
    "hfdata:DIR|NAME": "a data set of Hugging Face's datasets (pip install 'lowmem-pnn[hfdata]')",
    "text:FILE|DIR": "text for language models, as bytes or by --tokenizer",
    "jsonl:FILE": "lines with text, prompt and completion, or messages; with --tokenizer",
    "tokens:FILE.bin,dtype=uint16": "numbers of tokens, mapped",
    "file.py:factory": "what a function of yours returns: a map-style data set, or train and test",
}

METHOD_TEXTS: Mapping[str, str] = {
    "pnn": "partitions one after the other on synthetic intermediate labels: least memory, least traffic (arXiv 2403.11204)",
    "neuroflux": "blocks one after the other, every layer with a head and a loss of its own; early exits (arXiv 2402.14139)",
    "incubate": "partitions one after the other, each inside a thin model of the whole; then assembled (Deep Incubation, arXiv 2212.04129)",
    "exact": "ordinary training, bit for bit, one partition at a time: for large batches, and for fine-tuning",
    "backprop": "ordinary training of the whole model in the budget, where it fits",
}


@click.command()
@click.option("--all", "everything", is_flag=True, help="List torchvision's classifiers by name, too.")
@output_options
def models(everything: bool, as_json: bool, quiet: bool, debug: bool) -> None:
    """List the models that --model takes."""
    listed = dict(MODELS)
    if everything:
        from lowmem_pnn.sources.imports import import_torchvision

        models_of = import_torchvision("models")
        listed |= dict.fromkeys(models_of.list_models(module=models_of), "torchvision")
    _print(listed, as_json)


@click.command()
@output_options
def data(as_json: bool, quiet: bool, debug: bool) -> None:
    """List the data that --data takes."""
    _print(DATA, as_json)


@click.command()
@output_options
def methods(as_json: bool, quiet: bool, debug: bool) -> None:
    """List the training methods, and what each is for."""
    _print(METHOD_TEXTS, as_json)


def _print(listed: Mapping[str, str], as_json: bool) -> None:
    width = max(map(len, listed))
    lines = "\n".join(f"{name:<{width}}  {text}" for name, text in listed.items())
    print_result(json.dumps(listed, indent=1) if as_json else lines)
