"""Stand-ins for pynvml and torch.cuda, to be passed where those are taken."""

from types import SimpleNamespace

GIB = 2**30
MIB = 2**20


class Card:
    """A GPU: what NVML and CUDA say of it. `lost` makes NVML fail on it from then on."""

    def __init__(self, name="RTX 4090", total=24564 * MIB, used=600 * MIB, uuid="aa-1", bus=1, processes=(), slow=0):
        self.name, self.total, self.used, self.uuid, self.bus = name, total, used, uuid, bus
        self.processes, self.slow, self.lost = processes, slow, False
        self.cuda_total = int(total * 0.986)  # as on an RTX 4090
        self.reserved = 0


def card_of(gib: float) -> Card:
    return Card(f"{gib} GB card", int(gib * GIB), used=0)


class FakeNvml:
    NVML_TEMPERATURE_GPU = 0
    NVML_CLOCK_SM = 1

    class NVMLError(Exception):
        pass

    def __init__(self, cards=(), driver="560.94", readable=True):
        self.cards, self.driver, self.readable = list(cards), driver, readable
        self.sessions = 0

    def _answer(self, card, value):
        if card.lost:
            raise self.NVMLError("GPU is lost")
        return value

    def _find(self, key, value):
        for card in self.cards:
            if key(card) == value:
                return card
        raise self.NVMLError("Not Found")

    def nvmlInit(self):
        if not self.readable:
            raise self.NVMLError("Driver Not Loaded")
        self.sessions += 1

    def nvmlShutdown(self):
        self.sessions -= 1

    def nvmlSystemGetDriverVersion(self):
        return self.driver

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.cards[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self._find(lambda card: f"GPU-{card.uuid}", uuid)

    def nvmlDeviceGetHandleByPciBusId(self, place):
        return self._find(lambda card: f"00000000:{card.bus:02X}:00.0", place)

    def nvmlDeviceGetIndex(self, card):
        return self.cards.index(card)

    def nvmlDeviceGetName(self, card):
        return self._answer(card, card.name)

    def nvmlDeviceGetMemoryInfo(self, card):
        return self._answer(card, SimpleNamespace(total=card.total, used=card.used, free=card.total - card.used))

    def nvmlDeviceGetUtilizationRates(self, card):
        return self._answer(card, SimpleNamespace(gpu=5, memory=1))

    def nvmlDeviceGetPowerUsage(self, card):
        return self._answer(card, 123_400)

    def nvmlDeviceGetTemperature(self, card, sensor):
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._answer(card, 61)

    def nvmlDeviceGetClockInfo(self, card, kind):
        assert kind == self.NVML_CLOCK_SM
        return self._answer(card, 2520)

    def nvmlDeviceGetCurrentClocksEventReasons(self, card):
        raise self.NVMLError("Function Not Found")  # as before driver 535

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, card):
        return self._answer(card, card.slow)

    def nvmlDeviceGetComputeRunningProcesses(self, card):
        return self._answer(card, [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in card.processes])

    def nvmlDeviceGetGraphicsRunningProcesses(self, card):
        return self.nvmlDeviceGetComputeRunningProcesses(card)[:1]  # one that does both


class FakeCuda:
    """torch.cuda with these cards visible, in this order."""

    def __init__(self, cards=(), knows_uuid=True):
        self.cards, self.knows_uuid = list(cards), knows_uuid

    def is_available(self):
        return bool(self.cards)

    def device_count(self):
        return len(self.cards)

    def get_device_properties(self, device):
        card = self.cards[getattr(device, "index", device)]
        return SimpleNamespace(
            name=card.name, total_memory=card.cuda_total, major=8, minor=9, uuid=card.uuid if self.knows_uuid else None,
            pci_domain_id=0, pci_bus_id=card.bus, pci_device_id=0,
        )  # fmt: skip

    def mem_get_info(self, index):
        return self.cards[index].cuda_total - 10**9, self.cards[index].cuda_total

    def memory_reserved(self, index):
        return self.cards[index].reserved
