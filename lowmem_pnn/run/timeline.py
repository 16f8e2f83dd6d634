"""Timeline of memory: the highest use of each partition's time on the device, in a bounded number of points."""

MOST_POINTS = 240
"""Points that are kept until they are taken; more of them are merged in pairs."""


class MemoryTimeline:
    """Memory in use while a run goes on, by partition.

    Example:
        >>> timeline = MemoryTimeline()
        >>> timeline.add(0.5, 0, 100)
        >>> timeline.add(1.25, 1, 80)
        >>> timeline.take(), timeline.take()
        ([[0.5, 0, 100], [1.25, 1, 80]], [])
    """

    def __init__(self) -> None:
        self._points: list[list[float]] = []

    def add(self, seconds: float, partition: int, peak_bytes: int) -> None:
        """Add what was held since the point before.

        Args:
            seconds: time of the run at the end of it.
            partition: number of the partition that was on the device.
            peak_bytes: highest memory in use, above the floor.
        """
        self._points.append([round(seconds, 3), partition, peak_bytes])
        if len(self._points) > MOST_POINTS:
            self._points = merged(self._points)

    def take(self) -> list[list[float]]:
        """Return the points since the last call: seconds, partition and bytes of each."""
        points, self._points = self._points, []
        return points


def merged(points: list[list[float]]) -> list[list[float]]:
    """Return half as many points, each as high as the higher one of a pair, and of its partition.

    Args:
        points: seconds, partition and bytes of each.

    Example:
        >>> merged([[0.5, 0, 100], [1.25, 1, 80], [2.0, 1, 90]])
        [[1.25, 0, 100], [2.0, 1, 90]]
    """
    pairs = zip(points[::2], [*points[1::2], points[-1]], strict=False)
    return [[later[0], *max(first, later, key=lambda point: point[2])[1:]] for first, later in pairs]
