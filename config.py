"""Every setting of every stage. Constants only; each constant is also a flag of the scripts that use it.

The comment on a constant's line is also its help text in `--help`. A flag overrides this file.
Relative paths are relative to the folder in which a script is started; ~ is the home folder.
"""

# --- the list and the store ------------------------------------------------------------------------------------------
FORMATTED_DATA_PATH = "data/formatted.json"  # input: a folder of images, or a list (JSON, CSV, Parquet or URLs)
URL_FIELD = "url"  # field or column with the URL, stored as url; another field named url is stored as _url
ID_FIELD = "url"  # the field that identifies an item: id = uuid5(NAMESPACE_URL, value); changing it changes every id
CHROMADB_PATH = "data/chroma"  # folder of the embedded Chroma and of the journal of vectors; delete it to start over
COLLECTION_NAME = "images"  # name of the collection: 3 to 512 characters of a-z, A-Z, 0-9, '.', '_', '-'
CHROMA_SERVER_URL = ""  # http(s)://host:port of a Chroma server with the collection; "" = embedded Chroma
CHROMA_SERVER_HEADERS_ENV = ""  # environment variable with headers for the server as JSON, such as a token; "" = none
FAILED_DATA_PATH = "data/failed.json"  # failed items and their reasons: [{"index", "url", "reason", "detail"}]
IMAGE_CACHE_DIR_PATH = "data/images"  # folder of downloaded originals, which later stages read; "" = keep none
IMAGE_CACHE_MAX_BYTES = 20_000_000_000  # bytes; the limit; caching also stops when less than 10% of the disk is free
LOGS_DIR_PATH = "data/logs"  # folder of log files, one per run; "" = none

# --- the model --------------------------------------------------------------------------------------------------------
CLIP_MODEL_NAME = "ViT-B-32"  # an open_clip model name, 'hf-hub:ORG/NAME', 'local-dir:PATH' or 'timm:NAME'
CLIP_PRETRAINED = "laion2b_s34b_b79k"  # a tag or checkpoint file; "" = timm's default; unused with hf-hub:, local-dir:
DEVICE = "auto"  # auto (cuda, else mps, else cpu), or a torch device such as cpu or cuda:1
PRECISION = "auto"  # auto (the fastest that is accurate enough), fp32, bf16 or fp16
BATCH_SIZE = 32  # images per forward pass; 32 is best on CPUs, 256 and more on GPUs

# --- Ray, for more than one machine or GPU: pip install "ray[data]" ---------------------------------------------------
EMBED_RAY_ADDRESS = ""  # "" = this process; local starts Ray here; auto or ray://host:port joins a cluster
EMBED_RAY_ACTORS = 0  # number of actors; 0 = one per GPU, or without GPUs one per EMBED_RAY_CPUS_PER_ACTOR cores
EMBED_RAY_CPUS_PER_ACTOR = 1  # cores per actor; with GPUs, cores for its download and decoding processes

# --- the web ----------------------------------------------------------------------------------------------------------
DOWNLOAD_WORKERS = 128  # concurrent downloads, about 0.6 images/s each on the web; hundreds overload name servers
DOWNLOAD_WORKERS_PER_HOST = 0  # concurrent downloads from one host; 0 = no limit
DOWNLOAD_TIMEOUT_S = 15  # seconds; deadline of one attempt, from the connection to the last byte
DOWNLOAD_ATTEMPTS = 2  # attempts per image; the second recovers most failures, more recover few
DOWNLOAD_MAX_BYTES = 50_000_000  # bytes; larger bodies are refused
DOWNLOAD_ALLOW_LOCAL = False  # allow items on this machine or network: private addresses, file://, paths
DOWNLOAD_RESPECT_NOAI = True  # refuse images served with X-Robots-Tag noai or noimageai
MAX_IMAGE_PIXELS = 100_000_000  # width x height; larger images are refused before decoding

# --- annotation -------------------------------------------------------------------------------------------------------
ANNOTATED_DATA_PATH = "data/annotated.json"  # the annotations: JSON list of {"pos": [ids], "neg": [ids]}
ANN_SAMPLER_NAME = "random"  # random, metadata, cluster, k_center, typical, herding, ambiguous, text or ids
ANN_SAMPLER_CFG: dict = {}  # options of the sampler of main images, as JSON, such as {"fields": ["brand"]}
ANN_SEED = 0  # seed of the sampler; the same seed and data give the same directories
ANN_DIRRIFY_DIR_PATH = "data/dirrify"  # folder that ann_dirrify.py creates and the reviewer opens
ANN_DIRRIFY_NDIRS = 100  # directories to generate
ANN_DIRRIFY_NNEAREST = 20  # nearest images in a directory, in addition to the main image
ANN_DIRRIFY_PICK = "nearest"  # neighbors to show: nearest, or informative (near ones whose decisions teach the most)
ANN_DIRRIFY_PICK_AMONG = 160  # informative chooses among this many nearest images
ANN_DIRRIFY_POOL: list = []  # more collections with the same ids; a directory alternates between their nearest images
ANN_DIRRIFY_MAX_SIMILARITY = 1.0  # cosine; skip neighbors more similar than this to an image already listed; 1 = off
ANN_DIRRIFY_MAX_SIDE = 1600  # pixels; larger images and rare formats become JPEG or PNG copies; 0 = originals
ANN_DIRRIFY_WHERE: dict = {}  # Chroma `where` filter on metadata for main images, as JSON; {} = all images
ANN_DIRRIFY_NEIGHBORS_WHERE: dict = {}  # Chroma `where` filter for neighbors, as JSON; {} = all images
ANN_DIRRIFY_SHOW_JUDGED = False  # show judged pairs and discarded main images again
ANN_DIRRIFY_EXCLUDE_DIRS: list = []  # other reviewers' folders; images in them are not used as main images
ANN_HISTORY_PATH = "data/history.jsonl"  # shown images and decisions, as JSON lines; "" = none

# --- training and judging ---------------------------------------------------------------------------------------------
ANN_EXPORT_DIR_PATH = "data/export"  # folder for {format}.{split}.{extension}, and pairs.csv
ANN_EXPORT_FORMAT = "triplets"  # pairs, triplets, flagembedding, reranking or qrels
ANN_EXPORT_VALUE = "path"  # how an image is written: path, url or id; pairs and qrels always use id
ANN_EXPORT_SPLIT: dict = {"train": 0.8, "validation": 0.1, "test": 0.1}  # share of each split, as JSON; sum 1
ANN_EXPORT_SEED = 0  # seed of the split; the same seed and data give the same files
ANN_EXPORT_NEAR_DUPLICATE = 0.98  # cosine; images at least this similar are in the same split; above 1 = off
ANN_PROJECTION_PATH = "data/projection.npz"  # the learned projection: matrix, model facts, training groups, figures
ANN_TRAINED_COLLECTION_NAME = "images_trained"  # collection of the projected vectors; same ids and metadata
ANN_REPORT_DIR_PATH = "data/report"  # folder for report.html, report.json and thumbnails; it can be moved or zipped
