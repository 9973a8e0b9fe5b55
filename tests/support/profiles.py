"""A hardware profile of one's own, in round numbers."""

PROFILE = """
name: mine
precision: bf16
peak_tflops: {bf16: 100}
memory_gb: 40
memory_bandwidth_gb_s: 1000
gpus_per_node: 4
node_link: {gb_s: 100, latency_us: 2}
network_link: {gb_s: 10, latency_us: 20}
flash_attention: true
achievable: {matmul: 0.5, half_size: 100, memory: 0.5, link: 0.5}
"""
