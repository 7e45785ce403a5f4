"""Contract tests: subclass one in a test file, give one fixture, and inherit what every detector or strategy must pass.

    from clbench.testing import DetectorContract

    class TestMyDetector(DetectorContract):
        @pytest.fixture
        def build(self):
            return lambda: MyDetector(width=8, epochs=2, batch_size=3)

The tests need pytest and download nothing.
"""

from clbench.testing.detectors import DetectorContract
from clbench.testing.small import SmallDetector
from clbench.testing.strategies import StrategyContract

__all__ = ["DetectorContract", "SmallDetector", "StrategyContract"]
