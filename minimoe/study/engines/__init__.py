"""Models that run elsewhere: what engines that serve or train them say of their routing, read into the one trace."""
