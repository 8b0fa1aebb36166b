"""Where vectors live: the journal is the truth, and a Chroma collection is the index built from it.

vectors.py    the journal, a SQLite file: a record is stored once it is there, and embed.py counts it then
index.py      what is done to the collection, in child processes: a torn collection crashes a child at most
store.py      brings both in step: new records reach the collection in the background and at the end of a run. At the
              opening: a collection that nothing has touched since is not opened; a torn or missing one is made anew;
              after an interrupted write all vectors are compared and the differing ones written again; ids that people
              deleted from it stay deleted, but 100 or more of the newest at once are what a server has lost
collection.py opens and reads the collection for all stages; server.py does so for one on a Chroma server
migration.py  moves the journal of an earlier version into SQLite
model.py      compares and describes the models that collections remember
"""
