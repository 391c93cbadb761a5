"""Installation; every fact stands in settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path
from shutil import copytree, ignore_patterns

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def lines(key):
    return [line for line in settings[key].splitlines() if line.strip()]


class BuildWithNotebooks(build_py):
    """The notebooks travel in the wheel, as bigmodel_nb/nbs: part of the package."""

    def run(self):
        super().run()
        if not self.editable_mode:
            copytree(
                here / "nbs",
                Path(self.build_lib) / "bigmodel_nb" / "nbs",
                dirs_exist_ok=True,
                ignore=ignore_patterns(
                    ".*", "*.py", "__pycache__", "runs", "model", "_*"
                ),
            )


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Education",
        "Intended Audience :: Developers",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=f">={settings['min_python']}",
    packages=find_packages(include=["bigmodel_nb", "bigmodel_nb.*"]),
    package_data={"bigmodel_nb": ["data/files/*"]},
    install_requires=lines("requirements"),
    extras_require={
        "cluster": lines("cluster_requirements"),
        "site": lines("site_requirements"),
        "dev": lines("dev_requirements") + lines("site_requirements"),
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "jupyter_client.kernel_provisioners": [
            "bigmodel-fork = bigmodel_nb.headless.kernel:ForkProvisioner"
        ],
    },
    cmdclass={"build_py": BuildWithNotebooks},
    zip_safe=False,
)
