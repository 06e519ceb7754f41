"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from zoo.grids import WINDOW_ORDERS, make_qwen2, make_qwen2_5, make_qwen3, specimen

SPECIMENS = [
    specimen("qwen2_vl", make_qwen2, "mlp.fc2"),
    specimen("qwen2_5_vl", make_qwen2_5, "mlp.down_proj", orders=WINDOW_ORDERS),
    specimen("qwen3_vl", make_qwen3, "mlp.linear_fc2"),
]
