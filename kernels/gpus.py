"""What GPUs offer: peak rates, and the resources of those that the kernels are compiled for."""

from dataclasses import dataclass

# dense peak in TFLOP/s for bf16/fp16 matrix products with fp32 accumulation, from each vendor's
# data sheet, for one device as PyTorch counts them (half an MI250X); a device is known by the first
# entry whose words its name holds
PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.5),
    ("H200", 989.4),
    ("GH200", 989.4),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5),
    ("H100", 989.4),
    ("H800", 989.4),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("A40", 149.7),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("V100-PCIE", 112.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("MI355X", 2516.6),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),
    ("RX 7900 XTX", 122.8),
)


@dataclass(frozen=True)
class Architecture:
    """A multiprocessor (NVIDIA) or compute unit (AMD), from the vendors' programming guides.

    Attributes:
        like: the architecture whose tiles it runs with where the table has no row of its own.
        block_shared: most shared memory one block may have, in bytes.
        shared: shared memory of a multiprocessor for all its blocks, in bytes.
        reserved_shared: bytes of ``shared`` that the system takes for each block.
        registers: 32-bit registers per lane, for all warps of a scheduler together.
        register_step: registers of a thread are allocated in multiples of this.
        schedulers: warp schedulers, SIMD units on AMD.
        scheduler_warps: most warps (wavefronts) that one scheduler can hold.
        blocks: most blocks that can be resident.
        warp: threads per warp (wavefront).
    """

    like: str
    block_shared: int
    shared: int
    reserved_shared: int
    registers: int
    register_step: int
    schedulers: int
    scheduler_warps: int
    blocks: int
    warp: int = 32


# CUDA C++ programming guide, "Compute capabilities"; instruction set manuals of CDNA 2 to 4 and
# RDNA 3. The one list of architectures that the kernels are compiled for.
# A block of sm_80 may have 163 KB, but its tiles also serve NVIDIA GPUs that are not listed: 99 KB.
# On RDNA 3, what PyTorch counts as a multiprocessor is a pair of compute units.
ARCHITECTURES = {
    "sm_80": Architecture("", 99 * 1024, 164 * 1024, 1024, 512, 8, 4, 16, 32),
    "sm_86": Architecture("sm_80", 99 * 1024, 100 * 1024, 1024, 512, 8, 4, 12, 16),
    "sm_89": Architecture("sm_86", 99 * 1024, 100 * 1024, 1024, 512, 8, 4, 12, 24),
    "sm_90": Architecture("sm_80", 227 * 1024, 228 * 1024, 1024, 512, 8, 4, 16, 32),
    "sm_100": Architecture("sm_80", 227 * 1024, 228 * 1024, 1024, 512, 8, 4, 16, 32),
    "sm_120": Architecture("sm_86", 99 * 1024, 100 * 1024, 1024, 512, 8, 4, 12, 24),
    "gfx90a": Architecture("gfx942", 64 * 1024, 64 * 1024, 0, 512, 8, 4, 8, 16, 64),
    "gfx942": Architecture("sm_80", 64 * 1024, 64 * 1024, 0, 512, 8, 4, 8, 16, 64),
    "gfx950": Architecture("gfx942", 160 * 1024, 160 * 1024, 0, 512, 8, 4, 8, 16, 64),
    "gfx1100": Architecture("gfx942", 64 * 1024, 128 * 1024, 0, 1536, 24, 4, 16, 32),
}


def has_tf32(arch: str) -> bool:
    """Whether matrix units multiply fp32 in TF32; among AMD's GPUs, those of CDNA 3 alone do."""
    return arch == "gfx942" or not arch.startswith("gfx")


def has_fp8(arch: str) -> bool:
    """Whether matrix units multiply e4m3 and e5m2 and there are instructions that round to them.

    NVIDIA's do from compute capability 8.9 on; FP8 is not run on AMD's GPUs.
    """
    number = arch.removeprefix("sm_")
    return number.isdigit() and int(number) >= 89


def resident_blocks(arch: str, registers: int, shared_bytes: int, num_warps: int) -> int:
    """Blocks that fit on a multiprocessor at a time, by registers, shared memory and warp slots."""
    chip = ARCHITECTURES[arch]
    step = chip.register_step
    allocated = -(-max(registers, 1) // step) * step
    by_registers = chip.registers // allocated * chip.schedulers // num_warps
    by_shared = chip.shared // max(shared_bytes + chip.reserved_shared, 1)
    slots = chip.schedulers * chip.scheduler_warps
    return min(by_registers, by_shared, slots // num_warps, chip.blocks)


def occupancy(arch: str, registers: int, shared_bytes: int, num_warps: int) -> float:
    """Estimated share of a multiprocessor's warp slots that are filled, 0 to 1."""
    chip = ARCHITECTURES[arch]
    resident = resident_blocks(arch, registers, shared_bytes, num_warps)
    return resident * num_warps / (chip.schedulers * chip.scheduler_warps)


# the share of the data sheet's bandwidth that a copy reaches: an H200's moves 4.3 of 4.8 TB/s
COPY_SHARE = 0.9


@dataclass(frozen=True)
class GPU:
    """A product: its architecture, and from its data sheet the memory bandwidth in TB/s, the
    multiprocessors (compute units) and the clock under load in GHz.
    """

    name: str
    arch: str
    bandwidth: float
    multiprocessors: int
    clock: float

    @property
    def tflops(self) -> float:
        """Data-sheet peak of dense bf16 matrix products, in TFLOP/s."""
        return dict(PEAK_TFLOPS)[self.name]

    def roofline_us(self, flops: float, moved_bytes: float) -> float:
        """The least time a kernel can take, in microseconds; with 0 FLOPs, the memory's alone."""
        return max(flops / (self.tflops * 1e6), moved_bytes / (self.bandwidth * 1e6))

    def issue_us(self, warp_instructions: float) -> float:
        """Microseconds to issue these: one instruction per clock and scheduler, all busy."""
        schedulers = ARCHITECTURES[self.arch].schedulers * self.multiprocessors
        return warp_instructions / (schedulers * self.clock * 1e3)

    def memory_us(self, moved_bytes: float) -> float:
        """Microseconds to move these bytes at the share of the bandwidth that a copy reaches."""
        return moved_bytes / (COPY_SHARE * self.bandwidth * 1e6)


# bandwidth in TB/s from the vendors' data sheets (A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, one
# device of the two of an MI250X); the first one of an architecture stands for it in the report
GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        GPU("A100", "sm_80", 2.039, 108, 1.41),
        GPU("A40", "sm_86", 0.696, 84, 1.74),
        GPU("L40S", "sm_89", 0.864, 142, 2.52),
        GPU("H200", "sm_90", 4.8, 132, 1.7),
        GPU("H100", "sm_90", 3.35, 132, 1.7),
        GPU("B200", "sm_100", 8.0, 148, 1.85),
        GPU("RTX 5090", "sm_120", 1.792, 170, 2.41),
        GPU("MI250X", "gfx90a", 1.638, 110, 1.7),
        GPU("MI300X", "gfx942", 5.3, 304, 2.1),
        GPU("MI355X", "gfx950", 8.0, 256, 2.4),
        GPU("RX 7900 XTX", "gfx1100", 0.96, 48, 2.5),
    )
}
