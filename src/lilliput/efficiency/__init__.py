"""What a compression does to size, operations and time: counted, predicted for devices, and measured."""

from lilliput.efficiency.counts import Counts, count
from lilliput.efficiency.devices import Device, device, devices, measure_device
from lilliput.efficiency.prediction import Row
from lilliput.efficiency.roofline import rooflines
from lilliput.efficiency.serving import Serving, dense, sparse, w8a8, weight_only
from lilliput.efficiency.shapes import shapes_of
from lilliput.efficiency.speed import Speed, measure_speed
from lilliput.efficiency.zeros import count_zeros

__all__ = [
    "Counts",
    "Device",
    "Row",
    "Serving",
    "Speed",
    "count",
    "count_zeros",
    "dense",
    "device",
    "devices",
    "measure_device",
    "measure_speed",
    "rooflines",
    "shapes_of",
    "sparse",
    "w8a8",
    "weight_only",
]
