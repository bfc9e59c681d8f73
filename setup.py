"""Packaging: everything that pyproject.toml calls dynamic is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=['='])
ini.read(Path(__file__).parent/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
lib = cfg['lib_name']
statuses = {'1': 'Planning', '2': 'Pre-Alpha', '3': 'Alpha', '4': 'Beta', '5': 'Production/Stable'}

setup(
    version=cfg['version'],
    description=cfg['description'],
    keywords=cfg['keywords'].split(),
    author=cfg['author'],
    classifiers=[
        f"Development Status :: {cfg['status']} - {statuses[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        'Framework :: Jupyter',
        'Programming Language :: Python :: 3',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in (11, 12, 13)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Security',
    ],
    packages=find_packages(include=[lib, f'{lib}.*']),
    include_package_data=False,  # the wheel holds what package_data names, whatever MANIFEST.in puts into the sdist
    package_data={lib: cfg['package_data'].split()},
    install_requires=cfg['requirements'].split(),
    extras_require={x: cfg[f'{x}_requirements'].split() for x in ('dev', 'experiments', 'lab', 'ray', 'rewriting')},
    # `nbdev` is only a name that its documentation tools look up; nothing of it is imported at run time.
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': [f'{lib}={lib}._modidx:d']},
    zip_safe=False,
)
