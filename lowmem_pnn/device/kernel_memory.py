"""Memory that CPU kernels hold beside tensors: scratch memory inside an operation, and oneDNN's cache of compiled primitives.

Convolutions run in oneDNN, in blocked memory formats of its own: an operand in PyTorch's format is copied into a blocked one, and a
result is made blocked before it is copied out (oneDNN's developer guide, "Understanding Memory Formats"). So for a moment the
operands and results of a convolution exist twice. On 2 cores this explained, to a few percent, peaks that were up to three times
the size of the tensors, when the weights are large and the maps small.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""Whether kernels are those of processors with 512-bit vectors."""

# Size of the primitive that oneDNN compiles for one direction of a convolution of one shape, with the copies around it, and keeps.
# Measured with 512-bit vectors: 8.3 MB for the 33 of a ResNet-18 without its last block, 21.7 MB for about 105 of a MobileNetV2; with
# 256-bit vectors: 10.6 MB for the 90 of a MobileNetV2, 17.0 MB for the 138 of an EfficientNet-B0.
CONVOLUTION_PRIMITIVE_BYTES = 230_000 if HAS_AVX512 else 130_000
# Memory that matrix products hold from the first one on, to pack their operands, for each thread and 1,024 rows or columns of the
# widest; and the most. Measured for two threads: 3.2 MB for 1,024 x 1,024, 9.6 MB for 4,096 x 4,096.
_PACKING_BYTES, _MOST_PACKING_BYTES = 1_600_000, 4_800_000
# Elements of a factor for each of its rows or columns that counts: a long and thin one is packed in pieces.
_THIN = 512
# Size of the primitive of a matrix product in bfloat16, on a processor that has instructions for it. Measured: 2.05 MB for the three of
# a linear layer, forward and backward; in float32 and float16 nothing is compiled.
MATMUL_PRIMITIVE_BYTES = 700_000
_MATMULS = frozenset(
    variant
    for matmul in (torch.ops.aten.addmm, torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.baddbmm)
    for variant in (matmul.default, matmul.out)
)
# One layer of an LSTM, in one direction.
_LSTM, _LSTM_BACKWARD = torch.ops.aten.mkldnn_rnn_layer.default, torch.ops.aten.mkldnn_rnn_layer_backward.default
_LSTMS = frozenset((_LSTM, _LSTM_BACKWARD))
# Rows of oneDNN's workspaces are padded to so many bytes, and by as many more where they have a multiple of so many values.
_ROW_BYTES, _UNEVEN = 64, 256
_FLOAT_BYTES = 4
# oneDNN keeps so many primitives, and drops the least recently used ones.
PRIMITIVE_CACHE_CAPACITY = 1024


def cached_primitives(operation: Any, arguments: Sequence[Any]) -> dict[Hashable, int]:
    """Return the primitives that oneDNN compiles for an operation: equal keys share one primitive.

    Args:
        operation: operator as `torch.utils._python_dispatch` names it.
        arguments: positional arguments of the operation.

    Returns:
        Bytes by a key for each direction of a convolution, and for each matrix product in bfloat16, on the CPU; nothing for other
        operations.
    """
    if operation in _MATMULS:
        left, right = arguments[-2:]
        if left.device.type != "cpu" or left.dtype != torch.bfloat16:
            return {}
        key = tuple((tuple(operand.shape), operand.stride()) for operand in (left, right))
        return {("product", key): MATMUL_PRIMITIVE_BYTES}
    if operation is torch.ops.aten.convolution.default:
        directions, settings = ["forward"], arguments[3:]
    elif operation is torch.ops.aten.convolution_backward.default:
        directions, settings = ["input gradient", "weight gradient"], arguments[4:]
    else:
        return {}
    if arguments[0].device.type != "cpu":
        return {}
    shapes = tuple(tuple(argument.shape) for argument in arguments[:3] if isinstance(argument, Tensor))
    return {(direction, shapes, str(settings)): CONVOLUTION_PRIMITIVE_BYTES for direction in directions}


def packing_bytes(widest: int, threads: int) -> int:
    """Return the memory that matrix products hold to pack their operands.

    Args:
        widest: largest `product_width`; 0 where there are no products.
        threads: number of threads that compute.
    """
    return threads * min(_MOST_PACKING_BYTES, _PACKING_BYTES * widest // 1024)


def product_width(operation: Any, arguments: Sequence[Any]) -> int:
    """Return the largest number of rows or columns of a matrix product's factors, fewer for thin ones; 0 for other operations.

    Args:
        operation: operator as `torch.utils._python_dispatch` names it.
        arguments: positional arguments of the operation.
    """
    if operation not in _MATMULS:
        return 0
    factors = arguments[-2:]
    if factors[0].device.type != "cpu":
        return 0
    return int(max(min(max(factor.shape[-2:]), math.prod(factor.shape[-2:]) // _THIN) for factor in factors))


def untouched_bytes(operation: Any, arguments: Sequence[Any]) -> int:
    """Return the most that a kernel takes from the system without using it: no memory, but a limit on mappings counts it.

    Without 512-bit vectors the gradient of a weight whose kernel is larger than the map is computed by matrix products, in a scratch
    memory of four times the weight for each thread. Measured: of 76 MB for a weight of 9.4 MB, 18.7 MB are touched.

    Args:
        operation: operator as `torch.utils._python_dispatch` names it.
        arguments: positional arguments of the operation.
    """
    if not _by_products(operation, arguments):
        return 0
    weight = _bytes(arguments[2])
    return max(0, 4 * torch.get_num_threads() - 2) * weight


def _by_products(operation: Any, arguments: Sequence[Any]) -> bool:
    """Decide whether a convolution's weight gradient is computed by matrix products."""
    if HAS_AVX512 or operation is not torch.ops.aten.convolution_backward.default or arguments[0].device.type != "cpu":
        return False
    inputs, weight = arguments[1:3]
    return any(side < kernel for side, kernel in zip(inputs.shape[2:], weight.shape[2:], strict=True)) and arguments[9] == 1


def scratch_bytes(operation: Any, arguments: Sequence[Any], result: Any) -> int:
    """Estimate the most that a kernel holds beside its arguments and all its results.

    Args:
        operation: operator as `torch.utils._python_dispatch` names it.
        arguments: positional arguments of the operation.
        result: value that the operation returned.

    Returns:
        Bytes; 0 for operations that need none worth counting, and on devices other than the CPU.
    """
    if operation is torch.ops.aten.convolution.default:
        inputs, weight = arguments[:2]
        if inputs.device.type != "cpu":
            return 0
        # Channels last is a format of oneDNN's own: only the weight is copied, into that order and then into blocks.
        return 2 * _bytes(weight) if _is_channels_last(inputs) else _bytes(inputs) + _bytes(weight) + _bytes(result)
    if operation is torch.ops.aten.convolution_backward.default:
        gradient, inputs, weight = arguments[:3]
        if gradient.device.type != "cpu":
            return 0
        input_gradient, weight_gradient, _ = result
        if _is_channels_last(inputs):
            return 2 * max(_bytes(weight), _bytes(weight_gradient))
        # One after the other: the input's gradient, when the weight's is not there yet; then the weight's.
        first = _bytes(weight) + _bytes(input_gradient) - _bytes(weight_gradient)
        second = (2 if _by_products(operation, arguments) else 1) * _bytes(weight_gradient) + _bytes(inputs)
        return _bytes(gradient) + max(first, second)
    if operation in _LSTMS and arguments[0].device.type == "cpu":
        return _lstm_scratch_bytes(arguments, backward=operation is _LSTM_BACKWARD)
    return 0


def workspace_bytes(operation: Any, arguments: Sequence[Any]) -> int:
    """Return the bytes that a kernel keeps for its backward beside its results, which fake tensors show as empty.

    An LSTM in oneDNN keeps its gates, and its states and their gradients for every step, padded. Measured: 129.3 MB for 64 steps of 64
    samples with 256 inputs and 512 hidden values, of which this is 99.7 %; the system gives pages to a third of them in the forward, and
    to a second third in the backward, but the limit counts all. In eval mode it makes one too.

    Args:
        operation: operator as `torch.utils._python_dispatch` names it.
        arguments: positional arguments of the operation.
    """
    if operation is not _LSTM or arguments[0].device.type != "cpu":
        return 0
    return _gates_bytes(arguments) + _states_bytes(arguments)


def _lstm_scratch_bytes(arguments: Sequence[Any], *, backward: bool) -> int:
    """Return the scratch memory of one layer of an LSTM: its gates, and its weights, reordered."""
    weights = _bytes(arguments[1]) + _bytes(arguments[2])
    return _gates_bytes(arguments) + (2 if backward else 1) * weights


def _gates_bytes(arguments: Sequence[Any]) -> int:
    steps, samples = arguments[0].shape[:2]
    return int(steps * samples * arguments[1].shape[0]) * _FLOAT_BYTES


def _states_bytes(arguments: Sequence[Any]) -> int:
    steps, samples, inputs = arguments[0].shape
    hidden = arguments[2].shape[1]
    return int((steps + 1) * samples * (6 * _padded(max(inputs, hidden)) + 5 * hidden)) * _FLOAT_BYTES


def _padded(width: int) -> int:
    """Return the number of values in a row of oneDNN's workspaces."""
    values = _ROW_BYTES // _FLOAT_BYTES
    width = -(-width // values) * values
    return width + values if width % _UNEVEN == 0 else width


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
