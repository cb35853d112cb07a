"""What the command line refuses: the arguments, and what the message must say.

The files and folders that they name are written by ``tests.cli.bad_files``. A message names the
input, what was expected or what to do; the fragments of a row are those.
"""

from __future__ import annotations

from typing import TypeAlias

Row: TypeAlias = tuple[tuple[str, ...], list[str]]

NET = ("net.py:net", "--weights", "net.safetensors")
DATA = ("--data", "data.npz")
LOSSLESS = ("lossless", *NET, *DATA, "--size", "0.6", "--out", "out")
MADE = ("made", "--model", "net.py:net")


def _lossless(*changes: str) -> tuple[str, ...]:
    """The good command with some options changed; an empty value leaves one away."""
    values = dict(zip(LOSSLESS[2::2], LOSSLESS[3::2], strict=True))
    arguments = list(changes)
    model = arguments.pop(0) if arguments and not arguments[0].startswith("--") else LOSSLESS[1]
    values.update(zip(arguments[::2], arguments[1::2], strict=True))
    if ".py" not in model:
        values.pop("--weights")
    given = (pair for pair in values.items() if pair[1] != "")
    return ("lossless", model, *(word for pair in given for word in pair))


def _own(function: str, *changes: str) -> tuple[str, ...]:
    """The good command with a model of the user's own, with the weights it comes with."""
    return _lossless(function, "--weights", "", *changes)


def _text(data: str, *more: str) -> tuple[str, ...]:
    return ("compact", "llama", "--data", data, "--length", "16", "--out", "out", *more)


def _labels(data: str, *more: str) -> tuple[str, ...]:
    return ("lossless", "bert", "--data", data, "--size", ".8", "--out", "out", *more)


def _folder(model: str) -> tuple[str, ...]:
    return ("compact", model, "--data", "text.txt", "--out", "out")


def _made(folder: str, *more: str) -> tuple[str, ...]:
    return ("evaluate", folder, "--model", "net.py:net", *DATA, *more)


def _verified(folder: str, *more: str) -> tuple[str, ...]:
    return ("verify", folder, "--model", "net.py:net", *DATA, *more)


def _exported(folder: str, *more: str) -> tuple[str, ...]:
    return ("export", folder, "--model", "net.py:net", "--out", "out", *more)


SETTINGS: dict[str, Row] = {
    "size 0": (_lossless("--size", "0"), ["size is 0.0", "above 0 and at most 1"]),
    "size 1.5": (_lossless("--size", "1.5"), ["size is 1.5"]),
    "size nan": (_lossless("--size", "nan"), ["size is nan"]),
    "size in words": (_lossless("--size", "half"), ["--size", "valid number"]),
    "size in percent": (_lossless("--size", "60%"), ["--size", "valid number"]),
    "no size": (_lossless("--size", ""), ["--size"]),
    "size too small": (_lossless("--size", "0.001"), ["too small", "larger size"]),
    "size of": (_lossless("--size-of", "layers"), ["--size-of", "'layers'", "factorizable"]),
    "require": (_lossless("--require", "better"), ["--require is 'better'", "lossless"]),
    "margin": (_lossless("--margin", "-0.1"), ["margin is -0.1", "0 or more"]),
    "margin nan": (_lossless("--margin", "nan"), ["margin is nan", "0 or more"]),
    "compact margin": (("compact", *NET, *DATA, "--margin", "-1", "--out", "out"), ["margin is"]),
    "objective": (_lossless("--objective", "magic"), ["'magic'", "joint"]),
    "objective and embeddings": (
        (*_lossless("--objective", "svd"), "--embeddings"),
        ["embeddings", "kronecker or joint"],
    ),
    "form": (_lossless("--form", "tucker"), ["--form is 'tucker'", "pair, pivoted"]),
    "cost": (_lossless("--cost", "seconds"), ["--cost is 'seconds'", "parameters, flops"]),
    "effort": (_lossless("--effort", "quick"), ["--effort is 'quick'", "fast, standard"]),
    "task": (_lossless("--task", "clasification"), ["clasification", "classification"]),
    "task of another model": (_lossless("--task", "causal-lm"), ["causal-lm"]),
    "damping": (_lossless("--damping", "-1"), ["damping is -1", "0 or more, or auto"]),
    "damping in words": (_lossless("--damping", "some"), ["damping is 'some'", "number or auto"]),
    "damping twice": (
        _lossless("--damping", "auto", "--set", "output_damping=.1"),
        ["damping is auto", "leave output_damping out"],
    ),
    "rounds": (_lossless("--rounds", "0"), ["--rounds is 0", "1 or more"]),
    "rounds in parts": (_lossless("--rounds", "1.5"), ["--rounds", "valid integer"]),
    "self share": (_lossless("--self-share", "1"), ["--self-share is 1.0", "between 0 and 0.9"]),
    "self share of a net": (_lossless("--self-share", ".5"), ["self-share", "language model"]),
    "confidence": (_lossless("--confidence", "95"), ["--confidence is 95", "between 0.5 and 1"]),
    "test": (_lossless("--test", "z"), ["--test is 'z'", "bounded, t, betting"]),
    "largest change": (_lossless("--largest-change", "0"), ["--largest-change is 0", "above 0"]),
    "largest change and t": (
        _lossless("--largest-change", "1", "--test", "t"),
        ["no part in the t test", "leave"],
    ),
    "accuracy margin": (_lossless("--accuracy-margin", "-1"), ["accuracy", "-1"]),
    "limit": (_lossless("--limit", "2"), ["limit is 2", "at least 4"]),
    "limit in words": (_lossless("--limit", "all"), ["--limit", "valid integer"]),
    "selection limit": (_lossless("--selection-limit", "0"), ["--selection-limit is 0", "4"]),
    "held-out limit": (_lossless("--held-out-limit", "-9"), ["--held-out-limit is -9", "4"]),
    "batch size": (_lossless("--batch-size", "0"), ["--batch-size is 0", "1 or more"]),
    "seed": (_lossless("--seed", "x"), ["--seed", "valid integer"]),
    "set without a value": (_lossless("--set", "refit"), ["--set", "'refit' has no ="]),
    "set of nothing": (_lossless("--set", "refitt=no"), ["no setting 'refitt'", "refit"]),
    "set to no truth": (_lossless("--set", "refit=maybe"), ["refit is 'maybe'", "true or false"]),
    "step groups": (_lossless("--set", "step_groups=0"), ["step-groups is 0", "1 or more"]),
    "curvature": (_lossless("--set", "curvature=flat"), ["curvature is 'flat'", "sampled"]),
    "pattern": (_lossless("--include", "fc*"), ["'fc*'", "matches no layer", "hidden"]),
    "excluded pattern": (_lossless("--exclude", "fc*"), ["'fc*'", "matches no layer", "hidden"]),
    "all excluded": (_lossless("--exclude", "*"), ["no layer to factorize", "exclude"]),
    "device": (_lossless("--device", "gpu"), ["device is 'gpu'", "cpu, cuda"]),
    "device without float64": (_lossless("--device", "mps"), ["'mps'", "no float64"]),
    "device that is not there": (_lossless("--device", "cuda:99"), ["'cuda:99'", "sees"]),
    "mean": (_lossless("--mean", "a,b"), ["--mean is 'a,b'", "separated by commas"]),
    "mean channels": (_lossless("--mean", ".5,.5"), ["2 values", "1 channels"]),
    "mean nan": (_lossless("--mean", "nan"), ["mean", "nan"]),
    "std 0": (_lossless("--std", "0"), ["--std has the value 0.0", "std > 0"]),
    "std negative": (
        _lossless("--mean", "0", "--std", "-1"),
        ["--std has the value -1", "std > 0"],
    ),
    "skip broken": ((*_lossless(), "--skip-broken"), ["--skip-broken", "data.npz is none"]),
    "mean of records": (_labels("good.csv", "--mean", "0.5"), ["--mean has no part", "'text'"]),
    "std of text": (_text("text.txt", "--std", "2"), ["--std has no part", "plain text"]),
    "size of text": (_text("text.txt", "--image-size", "9"), ["--image-size has no part"]),
    "size of a function's": (
        _lossless("--data", "net.py:pairs", "--image-size", "8"),
        ["--image-size has no part in net.py:pairs", "model's input already"],
    ),
    "length of arrays": (_lossless("--length", "8"), ["--length has no part", "read as arrays"]),
    "text column of arrays": (
        _lossless("--text-column", "t"),
        ["--text-column has no part", "data.npz"],
    ),
    "tags column of labels": (
        _labels("good.csv", "--tags-column", "label"),
        ["--tags-column has no part", "'label'"],
    ),
    "target column of a classifier": (
        _labels("good.csv", "--target-column", "label"),
        ["--target-column has no part", "'label'"],
    ),
    "hidden words of a classifier": (
        _labels("good.csv", "--task", "masked-lm"),
        ["masked-lm", "made for classification"],
    ),
    "length 0": (_text("text.txt", "--length", "0"), ["--length is 0"]),
    "length 1": (_text("text.txt", "--length", "1"), ["--length is 1"]),
    "length too long": (_text("text.txt", "--length", "999"), ["999", "64"]),
    "unknown option": ((*_lossless(), "--sise", "1"), ["No such option: --sise", "--size"]),
    "unknown command": (("losless", *LOSSLESS[1:]), ["No such command 'losless'", "lossless"]),
    "no model at all": (("lossless",), ["Missing", "model"]),
    "a word too many": ((*_lossless(), "again"), ["again"]),
    "offload folder": (_lossless("--offload-folder", "no"), ["offload folder no is no folder"]),
    "memory": (_lossless("--memory", "8"), ["memory is '8'; expected", "such as 8GB"]),
    "memory too small": (_lossless("--memory", "1KB"), ["memory is 0.00 MB", "or more"]),
    "blocks": (_lossless("--blocks", "layers"), ["no module 'layers'", "names of its modules"]),
    "offload file": (_lossless("--offload-folder", "net.py"), ["net.py is no folder"]),
}

SOURCES: dict[str, Row] = {
    "no data": (("lossless", *NET, "--size", ".6", "--out", "out"), ["--data"]),
    "data twice": (_lossless("--selection", "data.npz"), ["give either --data", "--held-out"]),
    "a part missing": (
        _lossless("--data", "", "--calibration", "data.npz"),
        ["there is no data", "--selection"],
    ),
    "missing data": (_lossless("--data", "no.npz"), ["no.npz does not exist"]),
    "empty text": (_lossless("--data", "empty.txt"), ["empty.txt is empty"]),
    "text without tokenizer": (_lossless("--data", "net.py"), ["net.py", "tokenizer"]),
    "own text of a net": (_lossless("--data", "self"), ["writes no text of its own"]),
    "one class": (_lossless("--data", "one"), ["one class folder only", "two or more"]),
    "empty folder": (_lossless("--data", "nothing"), ["nothing"]),
    "empty classes": (_lossless("--data", "empty classes"), ["empty classes"]),
    "flat images": (_lossless("--data", "flat"), ["flat", "folder"]),
    "images and sounds": (_lossless("--data", "mixed"), ["mixed holds both", "two folders"]),
    "broken images": (_lossless("--data", "broken images"), ["cat/a.png", "--skip-broken"]),
    "broken sounds": (_lossless("--data", "broken sounds"), ["cat/a.wav", "--skip-broken"]),
    "folder of texts": (_lossless("--data", "texts"), ["texts", "a.txt", "Give one of them"]),
    "labels": (_lossless("--data", "labels.npz"), ["outside the model's 4 logits"]),
    "negative labels": (_lossless("--data", "negative.npz"), ["negative.npz", "-3"]),
    "labels between": (
        _lossless("--data", "halves.npz"),
        ["halves.npz", "one whole number per example"],
    ),
    "nan data": (_lossless("--data", "nan.npz"), ["nan.npz", "NaN", "example 17"]),
    "no y": (_lossless("--data", "noy.npz"), ["noy.npz holds x", "x and y"]),
    "no rows": (_lossless("--data", "none.npz"), ["none.npz"]),
    "unequal": (_lossless("--data", "unequal.npz"), ["unequal.npz", "400", "50"]),
    "few": (_lossless("--data", "few.npz"), ["9 different examples", "too few"]),
    "object array": (_lossless("--data", "object.npz"), ["object.npz", "no pickles"]),
    "complex array": (_lossless("--data", "complex.npz"), ["complex.npz", "complex"]),
    "array of words": (_lossless("--data", "words.npz"), ["words.npz"]),
    "cut array": (_lossless("--data", "cut.npz"), ["cut.npz"]),
    "pickle data": (_lossless("--data", "net.pth"), ["net.pth", ".pth"]),
    "channels": (_lossless("--data", "colour.npz"), ["model can't run on the data", "3 channels"]),
    "weights as data": (_lossless("--data", "net.safetensors"), ["net.safetensors", "binary"]),
    "no such function": (_lossless("--data", "net.py:nothing"), ["net.py has no nothing"]),
    "no such file": (_lossless("--data", "no.py:pairs"), ["no such file: no.py"]),
    "no data given": (_lossless("--data", "net.py:no_data"), ["NoneType", "data set"]),
    "a text given": (_lossless("--data", "net.py:texts"), ["str", "data set"]),
    "no labels given": (_lossless("--data", "net.py:unlabelled"), ["label"]),
    "ragged data": (_lossless("--data", "net.py:ragged"), ["can't run on the data", "(1, 1, 8, "]),
    "a stream that fails": (
        _lossless("--data", "net.py:ending"),
        ["example 30", "the disk is gone"],
    ),
    "float labels": (_lossless("--data", "net.py:float_labels"), ["label"]),
    "raising data": (_lossless("--data", "net.py:broken"), ["broken()", "no such luck"]),
    "a model as data": (_lossless("--data", "net.py:net"), ["Net", "data set"]),
    "short text": (_text("short.txt"), ["short.txt", "at least 12"]),
    "latin text": (_text("latin.txt"), ["latin.txt", "not UTF-8"]),
    "utf-16 text": (_text("utf16.txt"), ["utf16.txt is UTF-16", "iconv"]),
    "binary text": (_text("binary.txt"), ["binary.txt is a binary file"]),
    "white text": (_text("white.txt"), ["white.txt"]),
    "spreadsheet": (_labels("sheet.xlsx"), ["sheet.xlsx is a spreadsheet", ".csv"]),
    "json": (_text("one.json"), ["one.json is one JSON value", ".jsonl"]),
    "images of a text model": (_text("broken images"), ["broken images"]),
    "arrays of a text model": (_text("data.npz"), ["data.npz"]),
    "chat": (_text("chat.jsonl"), ["chat.jsonl", "no chat template"]),
    "labels of plain text": (_labels("lines.txt"), ["needs labels", "--task teacher"]),
    "broken line": (_labels("broken.jsonl"), ["broken.jsonl", "line 4"]),
    "list line": (_labels("list.jsonl"), ["list.jsonl", "line 3", "object"]),
    "no label": (_labels("nolabel.jsonl"), ["nolabel.jsonl", "label", "--label-column"]),
    "no text": (_labels("notext.jsonl"), ["notext.jsonl", "text", "--text-column"]),
    "no such column": (_labels("good.csv", "--text-column", "txt"), ["good.csv", "txt"]),
    "no such label": (_labels("good.csv", "--label-column", "y"), ["good.csv", "y"]),
    "number as text": (_labels("number.jsonl"), ["number.jsonl", "record 40", "expected texts"]),
    "label out of range": (_labels("labels.jsonl"), ["9", "label"]),
    "unknown label": (_labels("names.jsonl"), ["splendid"]),
    "blank lines": (_labels("blank.jsonl"), ["blank.jsonl"]),
    "three records": (_labels("three.jsonl"), ["3 different examples", "too few"]),
    "header alone": (_labels("header.csv"), ["header.csv"]),
    "columns": (_labels("columns.csv"), ["columns.csv", "line 3"]),
    "column twice": (_labels("twice.csv"), ["twice.csv", "text"]),
    "open quote": (_labels("quote.csv"), ["quote.csv"]),
    "latin csv": (_labels("latin.csv"), ["latin.csv", "UTF-8"]),
    "tsv without label": (_labels("nolabel.tsv"), ["nolabel.tsv", "label"]),
    "parquet without label": (_labels("nolabel.parquet"), ["nolabel.parquet", "label"]),
    "broken parquet": (_labels("broken.parquet"), ["broken.parquet"]),
    "text as parquet": (_labels("text.parquet"), ["text.parquet"]),
    "broken arrow": (_labels("saved"), ["saved"]),
    "tags": (
        _labels("pairs.jsonl", "--task", "token-classification"),
        ["pairs.jsonl", "tokens", "tags"],
    ),
    "seq2seq of a classifier": (
        _labels("good.jsonl", "--task", "seq2seq"),
        ["column 'target'", "--target-column"],
    ),
    "records of a net": (_lossless("--data", "good.csv"), ["good.csv", "expected numbers"]),
}

MODELS: dict[str, Row] = {
    "too large for the GPU": (_lossless("net.py:hungry"), ["GPU's memory", "--device cpu"]),
    "shape": (_lossless("--weights", "shape.safetensors"), ["out.weight", "(5, 64)", "(4, 64)"]),
    "name": (_lossless("--weights", "extra.safetensors"), ["extra: not in the model"]),
    "name missing": (_lossless("--weights", "less.safetensors"), ["hidden.bias", "missing"]),
    "nan weights": (_lossless("--weights", "nan.safetensors"), ["conv.weight holds NaN"]),
    "inf weights": (_lossless("--weights", "inf.safetensors"), ["conv.weight holds", "inf"]),
    "no tensors": (_lossless("--weights", "no.tensors.safetensors"), ["no.tensors.safetensors"]),
    "broken weights": (_lossless("--weights", "broken.safetensors"), ["broken.safetensors can't"]),
    "zero weights": (_lossless("--weights", "zero.safetensors"), ["zero.safetensors"]),
    "cut weights": (_lossless("--weights", "cut.safetensors"), ["cut.safetensors"]),
    "page for weights": (_lossless("--weights", "page.safetensors"), ["page.safetensors"]),
    "missing weights": (_lossless("--weights", "no.safetensors"), ["no such weights file"]),
    "folder for weights": (_lossless("--weights", "full"), ["weights", "full"]),
    "pickled weights": (_lossless("--weights", "net.pth"), ["net.pth", "no pickles"]),
    "weights of a folder": (
        (*_folder("llama"), "--weights", "net.safetensors"),
        ["--weights goes with", "llama"],
    ),
    "no layer": (_own("net.py:no_layer"), ["no layer to factorize"]),
    "not a model": (_own("net.py:number"), ["gave a int", "nn.Module"]),
    "list of models": (_own("net.py:two_nets"), ["gave a list", "nn.Module"]),
    "raises": (_own("net.py:broken"), ["broken", "no such luck"]),
    "exits": (_own("net.py:exiting"), ["ended the program (SystemExit: 0)", "exit()"]),
    "syntax below": (_own("net.py:syntax"), ["net.py:syntax()", "SyntaxError"]),
    "needs an argument": (_own("net.py:needs_argument"), ["width", "without arguments"]),
    "on meta": (_own("net.py:meta"), ["meta", "weights"]),
    "a loss, no logits": (_own("net.py:scalar_output"), ["float32 ()", "expected logits"]),
    "no output": (_own("net.py:no_output"), ["NoneType"]),
    "forward raises": (_own("net.py:raising_forward"), ["not on a Monday"]),
    "data as a model": (_own("net.py:pairs"), ["gave a TensorDataset", "nn.Module"]),
    "syntax": (_own("syntax.py:net"), ["importing syntax.py failed", "SyntaxError", "line 1"]),
    "imports": (_own("imports.py:net"), ["imports.py failed", "no_such_module_of_mine"]),
    "leaves": (_own("leaves.py:net"), ["ended the program (SystemExit: bye)", "exit()"]),
    "no Python file": (_own("no.py:net"), ["no such file: no.py"]),
    "no function": (_own("net.py:nett"), ["net.py has no nett", "net"]),
    "no module": (_own("no_such_package:net"), ["no_such_package", "ModuleNotFoundError"]),
    "a file alone": (
        _lossless("net.py", "--weights", ""),
        ["net.py is a file", "file.py:function"],
    ),
    "no model": (_lossless("nowhere"), ["nowhere does not exist", "transformers folder"]),
    "hub name": (_lossless("somebody/llama"), ["does not exist", "hf download"]),
    "weights as model": (_lossless("net.safetensors"), ["net.safetensors is a file", "--weights"]),
    "timm option": (_own("timm:resnet18,pretrained=true"), ["option 'pretrained'", "num_classes"]),
    "unknown architecture": (_folder("novice"), ["novice", "no-such-model"]),
    "no type": (_folder("typeless"), ["typeless", "model_type"]),
    "empty model": (_folder("nothing"), ["nothing", "config.json"]),
    "no config": (_folder("no config"), ["no config", "config.json"]),
    "broken config": (_folder("broken config"), ["broken config"]),
    "list config": (_folder("list config"), ["list config"]),
    "wide": (_folder("wide"), ["wide", "model.embed_tokens.weight"]),
    "deep": (_folder("deep"), ["deep", "model.layers.1"]),
    "width in words": (_folder("worded"), ["worded", "hidden_size"]),
    "no weights": (_folder("no weights"), ["no weights", "safetensors"]),
    "cut shard": (_folder("cut"), ["cut"]),
    "missing shard": (_folder("shards"), ["model-00001-of-00001.safetensors"]),
    "nan in a folder": (_folder("nan"), ["model.norm.weight holds NaN"]),
    "no tokenizer": (_folder("no tokenizer"), ["tokenizer"]),
    "broken tokenizer": (_folder("broken tokenizer"), ["tokenizer", "broken tokenizer"]),
    "adapter": (_folder("adapter"), ["adapter", "somebody/llama"]),
    "remote code": (_folder("remote"), ["remote", "code"]),
    "hub cache": (_folder("hub"), ["hub", "snapshots"]),
    "no GGUF": (_folder("text.gguf"), ["text.gguf"]),
    "cut GGUF": (_folder("head.gguf"), ["head.gguf"]),
    "missing GGUF": (_folder("no.gguf"), ["no.gguf"]),
    "factorized already": (_folder("made text"), ["made text", "factorized already"]),
}

FOLDERS: dict[str, Row] = {
    "full folder": (_lossless("--out", "full"), ["full exists and is not empty", "--overwrite"]),
    "not ours": ((*_lossless("--out", "full"), "--overwrite"), ["not overwritten"]),
    "no out": (_lossless("--out", ""), ["--out is missing"]),
    "out is a file": (_lossless("--out", "net.py"), ["net.py"]),
    "out below a file": (_lossless("--out", "net.py/out"), ["net.py/out can't be written"]),
    "out is proc": (_lossless("--out", "/proc/out"), ["/proc/out can't be written"]),
    "evaluate nothing": (("evaluate", "no", *DATA), ["no such folder: no"]),
    "evaluate without data": (("evaluate", *MADE), ["--data"]),
    "evaluate a model": (_made("llama"), ["llama", "no rankfold artifact"]),
    "evaluate limit": (_made("made", "--limit", "0"), ["--limit is 0", "1 example"]),
    "evaluate data": (_made("made", "--data", "no.npz"), ["no.npz does not exist"]),
    "evaluate few": (_made("made", "--data", "none.npz"), ["none.npz"]),
    "evaluate without class": (("evaluate", "made", *DATA), ["Net", "--model file.py:function"]),
    "evaluate other class": (
        ("evaluate", "made", "--model", "net.py:no_layer", *DATA),
        ["made"],
    ),
    "evaluate a folder as class": (
        ("evaluate", "made", "--model", "llama", *DATA),
        ["--model is llama", "file.py:function"],
    ),
    "evaluate batch size": (_made("made", "--batch-size", "0"), ["--batch-size is 0", "1 or more"]),
    "evaluate task": (_made("made", "--task", "sorting"), ["sorting", "classification"]),
    "evaluate channels": (
        _made("made", "--data", "colour.npz"),
        ["shape is 3x8x8", "made with 1x8x8"],
    ),
    "inspect nothing": (("inspect", "full"), ["no rankfold artifact"]),
    "inspect no folder": (("inspect", "nowhere"), ["nowhere"]),
    "inspect a file": (("inspect", "net.py"), ["net.py"]),
    "inspect layer": (("inspect", "made", "--layer", "hiden"), ["'hiden'", "hidden"]),
    "unlisted": (_made("unlisted"), ["unlisted", "no rankfold artifact"]),
    "cut list": (_made("cut list"), ["cut list/rankfold.json"]),
    "empty list": (("inspect", "empty list"), ["empty list/rankfold.json"]),
    "no object": (("inspect", "no object"), ["no object/rankfold.json", "object"]),
    "newer": (_made("newer"), ["rankfold.json", "99", "newer"]),
    "layerless": (_made("layerless"), ["rankfold.json", "layers"]),
    "ranked": (_made("ranked"), ["rankfold.json", "expected a positive rank of conv"]),
    "formed": (_made("formed"), ["rankfold.json", "expected a form of hidden"]),
    "unmodelled": (_made("unmodelled"), ["rankfold.json", "model"]),
    "inspect layerless": (("inspect", "layerless"), ["rankfold.json", "layers"]),
    "weightless": (_made("weightless"), ["weightless", "model.safetensors"]),
    "cut artifact": (_made("cut weights"), ["cut weights/model.safetensors"]),
    "nan artifact": (_made("nan weights"), ["nan weights", "digest"]),
    "other weights": (_made("other weights"), ["any"]),
    "uncertified": (_verified("uncertified"), ["certificate.json"]),
    "cut certificate": (_verified("cut certificate"), ["certificate.json"]),
    "newer certificate": (_verified("newer certificate"), ["certificate.json", "99"]),
    "unsaid": (_verified("unsaid"), ["certificate.json", "statement"]),
    "said in words": (_verified("said in words"), ["certificate.json", "margin"]),
    "verify other data": (_verified("made", "--data", "labels.npz"), ["none of the certificate's"]),
    "verify weights alone": (
        ("verify", "made", *DATA, "--weights", "net.safetensors"),
        ["--weights goes with --model"],
    ),
    "verify nothing": (_verified("full"), ["no rankfold artifact"]),
    "export without form": (_exported("made"), ["--to"]),
    "export form": (_exported("made", "--to", "tflite"), ["--to is 'tflite'", "onnx"]),
    "export nothing": (_exported("no", "--to", "dense"), ["no"]),
    "export to full": (
        _exported("made", "--to", "dense", "--out", "full"),
        ["full exists", "--overwrite"],
    ),
    "export over mine": (
        _exported("made", "--to", "dense", "--out", "full", "--overwrite"),
        ["not overwritten"],
    ),
    "export dtype": (_exported("made", "--to", "pt2", "--dtype", "int8"), ["'int8'", "float16"]),
    "export dtype of dense": (
        _exported("made", "--to", "dense", "--dtype", "float16"),
        ["--dtype", "onnx"],
    ),
    "export shape": (
        _exported("made", "--to", "pt2", "--input-shape", "axb"),
        ["'axb'", "3x224x224"],
    ),
    "export shape twice": (
        _exported("made", "--to", "pt2", "--input-shape", "1x8x8", "--inputs", "net.py:pairs"),
        ["--input-shape", "--inputs"],
    ),
    "export inputs": (_exported("made", "--to", "pt2", "--inputs", "net.py:number"), ["number"]),
    "export other shape": (
        _exported("made", "--to", "pt2", "--input-shape", "3x8x8"),
        ["shape is 3x8x8", "made with 1x8x8"],
    ),
    "export broken": (_exported("cut weights", "--to", "pairs"), ["model.safetensors"]),
    "evaluate broken tokens": (
        ("evaluate", "no tokens", "--data", "text.txt"),
        ["tokenizer", "no tokens"],
    ),
}

BAD = {**SETTINGS, **SOURCES, **MODELS, **FOLDERS}
