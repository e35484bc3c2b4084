"""How much recurrent networks can store, and how well they can be trained: six cells, six tasks, one budget, a tuner.

Source: Collins, Sohl-Dickstein & Sussillo, "Capacity and trainability in recurrent neural networks", ICLR 2017.
"""
