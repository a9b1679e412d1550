"""Says what a training costs in money, and which devices of a cluster to rent for it"""
