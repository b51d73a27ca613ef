"""The subcommands of `slipstream`: each module registers one."""
