"""The parity report: one page that says whether all is well on this machine, and how close to the edge."""
