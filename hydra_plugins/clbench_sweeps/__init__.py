"""The sweeper and the launchers under the names that Hydra takes them by: it takes none from other packages."""

from clbench.sweeps import launchers, sweeper


class RunSweeper(sweeper.RunSweeper):
    """hydra/sweeper=runs, the default."""


class SequentialLauncher(launchers.SequentialLauncher):
    """hydra/launcher=sequential, the default."""


class LocalLauncher(launchers.LocalLauncher):
    """hydra/launcher=local."""


class ClusterLauncher(launchers.ClusterLauncher):
    """hydra/launcher=slurm and slurm_cpu."""


PLUGINS = (RunSweeper, SequentialLauncher, LocalLauncher, ClusterLauncher)
