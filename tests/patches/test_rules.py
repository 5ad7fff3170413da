"""The rule files in patches/: each loads, explains itself, and decides as it should on commands of real builds."""

# Command lines read better unbroken:
# ruff: noqa: E501

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from termite.command.localrc import Decision, load_rules
from termite.command.shell import command_text

PATCHES = Path(__file__).resolve().parents[2] / "patches"
FILES = sorted(path.name.removesuffix(".termite-localrc") for path in PATCHES.glob("*.termite-localrc"))

REMOTE = Decision(local=False)
LOCAL = Decision(local=True)
RECURSE = Decision(local=True, recurse=True)
MAKE = Decision(local=True, recurse=True, skip_refresh=True)
QUIET = Decision(local=True, skip_refresh=True)

ANYWHERE = {
    # In every file: what any build may do.
    "gcc -O2 -c -o make.o make.c": REMOTE,
    "gcc -DINSTALL=1 -I/usr/include/x -c -o git.o ../src/git.c": REMOTE,
    "/usr/bin/c++ -O2 -MD -MT a.o -MF a.o.d -o a.o -c /home/me/configure/src/find.cc": REMOTE,
    "x86_64-linux-gnu-gcc -o find find.o regex.o libgnu.a -lcurl": REMOTE,
    "gcc -o install install.o; chmod 755 install": REMOTE,
    "echo '  CC      make.o'; gcc -c make.c": REMOTE,
    "cp -p /usr/share/gettext/gettext.h intl/gettext.h.tmp2": REMOTE,
    "/bin/bash ./libtool --tag=CC --mode=compile gcc -g -O2 -c -o l.lo l.c": REMOTE,
    "/bin/bash ./libtool --tag=CC --mode=link gcc -g -O2 -o liba.la -rpath /usr/lib a.lo b.lo": REMOTE,
    "ln -s /usr/include/x.h x.h && mv x.h.tmp x.h": REMOTE,
    "python3 ../tools/gen.py --out gen.h": REMOTE,
    "termite-make -C sub all": MAKE,
    "make -C sub CFLAGS=-O2 all": MAKE,
    "cd lib && /usr/bin/termite-make -f Makefile.sub": MAKE,
    "fail=no; \\\nfor d in lib src; do \\\n  (cd $d && termite-make all) || fail=yes; \\\ndone; test $fail = no": RECURSE,
    "mkdir -p out; make -C out -f ../Makefile": RECURSE,
    "sh -c 'termite-make all'": RECURSE,
    "termite-make install-exec-am": LOCAL,
    "git describe --tags > version": LOCAL,
    "v=`git rev-parse HEAD`; echo $v > rev.h": LOCAL,
    "find . -name '*.o' -print | xargs rm -f": LOCAL,
    "wget -q https://ftp.gnu.org/gnu/gmp/gmp-6.2.1.tar.bz2": LOCAL,
    "/usr/bin/install -c -m 644 a.h /usr/local/include": LOCAL,
    " /usr/bin/mkdir -p '/usr/local/bin' ; /bin/bash ../libtool --mode=install /usr/bin/install -c p '/usr/local/bin'": LOCAL,
    "read answer < /dev/tty; echo $answer > answer": LOCAL,
    "sort a b > /tmp/list.$PPID": LOCAL,
    "ldconfig -n /usr/local/lib": LOCAL,
    "cd .. && cp -p a.conf '/etc/a.conf'; true": LOCAL,
}

KBUILD_CC = (
    "set -e;  echo '  CC      kernel/fork.o'; trap 'rm -f kernel/fork.o; trap - HUP; kill -s HUP $$' HUP;  "
    "gcc -Wp,-MMD,kernel/.fork.o.d -nostdinc -I./arch/x86/include -include ./include/linux/kconfig.h -D__KERNEL__ "
    "-O2 -fno-strict-aliasing   -DKBUILD_MODFILE='\"kernel/fork\"' -DKBUILD_BASENAME='\"fork\"' -c -o kernel/fork.o "
    "kernel/fork.c  ; ./tools/objtool/objtool --hacks=jump_label --orc --retpoline  kernel/fork.o ; "
    "./scripts/basic/fixdep kernel/.fork.o.d kernel/fork.o 'gcc -Wp,-MMD,kernel/.fork.o.d -c -o kernel/fork.o kernel/fork.c'"
    " > kernel/.fork.o.cmd; rm -f kernel/.fork.o.d"
)

COMMANDS: dict[str, dict[str, Decision]] = {
    "linux": {
        KBUILD_CC: REMOTE,
        KBUILD_CC.replace("kernel/fork", "drivers/tty/tty_io"): REMOTE,
        "set -e;  echo '  HOSTCC  scripts/kconfig/conf.o'; gcc -Wp,-MMD,scripts/kconfig/.conf.o.d -c -o scripts/kconfig/conf.o"
        " scripts/kconfig/conf.c; scripts/basic/fixdep x y 'gcc' > z": REMOTE,
        "gcc   -o scripts/kconfig/conf scripts/kconfig/conf.o scripts/kconfig/symbol.o": REMOTE,
        "gcc -Wall -O2 -o scripts/sign-file scripts/sign-file.c -lcrypto": REMOTE,
        "gcc -o usr/gen_init_cpio usr/gen_init_cpio.c": REMOTE,
        "gcc   -o scripts/mod/modpost scripts/mod/modpost.o scripts/mod/file2alias.o": REMOTE,
        "rm -f fs/ext4/built-in.a;  ar cDPrST fs/ext4/built-in.a fs/ext4/balloc.o fs/ext4/bitmap.o": REMOTE,
        "ld -m elf_x86_64 -z noexecstack -r -o fs/ext4/ext4.o @fs/ext4/ext4.mod": REMOTE,
        "ld -r -m elf_x86_64 --build-id=sha1 -T scripts/module.lds -o fs/ext4/ext4.ko fs/ext4/ext4.o fs/ext4/ext4.mod.o": REMOTE,
        "gcc -nostdinc -I/lib/modules/6.1.0-18-amd64/build/include -c -o hello.o hello.c": REMOTE,
        "sh ./scripts/headers_install.sh include/uapi/linux/fs.h usr/include/linux/fs.h": REMOTE,
        "sh ./scripts/checksyscalls.sh gcc -Wp,-MMD,./.missing-syscalls.d -nostdinc": REMOTE,
        "termite-make -f ./scripts/Makefile.build obj=kernel need-builtin=1": MAKE,
        "make -f ./scripts/Makefile.build obj=. need-modorder=1": MAKE,
        "termite-make -C ./tools/objtool O=/src/linux/tools/objtool subdir=tools/objtool": MAKE,
        "scripts/kconfig/conf  --syncconfig Kconfig": LOCAL,
        "scripts/kconfig/mconf  Kconfig": LOCAL,
        "set -e; scripts/kconfig/conf --defconfig=arch/x86/configs/x86_64_defconfig Kconfig": LOCAL,
        "./scripts/kconfig/merge_config.sh -m .config kvm_guest.config": RECURSE,
        "set -e; { ./scripts/setlocalversion .; } > include/config/.tmp_kernel.release": LOCAL,
        "/bin/sh ./scripts/mkcompile_h include/generated/compile.h \"x86_64\" \"SMP\" \"gcc\"": LOCAL,
        "/bin/bash scripts/link-vmlinux.sh \"ld\" \"-m elf_x86_64 -z noexecstack\" \"--emit-relocs\"": RECURSE,
        "set -e; echo '  LD      vmlinux.o'; ld -m elf_x86_64 -r -o vmlinux.o  --whole-archive built-in.a": LOCAL,
        "objcopy  -R .comment -S vmlinux arch/x86/boot/compressed/vmlinux.bin": LOCAL,
        "nm vmlinux | sed -n -e 's/^\\([0-9a-fA-F]*\\)/p' > arch/x86/boot/voffset.h": LOCAL,
        "scripts/mod/modpost -M -m     -o Module.symvers -T modules.order vmlinux.o": LOCAL,
        "openssl req -new -nodes -utf8 -sha256 -days 36500 -batch -x509 -config certs/x509.genkey -keyout certs/signing_key.pem": LOCAL,
        "scripts/sign-file sha256 certs/signing_key.pem certs/signing_key.x509 /lib/modules/6.1.0/kernel/fs/ext4.ko": LOCAL,
        "sh ./usr/gen_initramfs.sh -o usr/initramfs_data.cpio -l usr/.initramfs_data.cpio.d /root/initrd": LOCAL,
        "termite-make -f ./scripts/Makefile.modinst": LOCAL,
        "make modules_install": LOCAL,
        "sh ./scripts/depmod.sh 6.1.0": LOCAL,
        "/bin/sh ./kernel/gen_kheaders.sh kernel/kheaders_data.tar.xz": LOCAL,
        "/bin/bash ./scripts/package/builddeb linux-image": RECURSE,
        "./tools/testing/kunit/kunit.py run": LOCAL,
        "sphinx-build -b html -c ./Documentation -d Documentation/output/.doctrees ./Documentation out": LOCAL,
        "/bin/bash ./scripts/tags.sh cscope": LOCAL,
    },
    "gcc": {
        "/obj/./prev-gcc/xg++ -B/obj/./prev-gcc/ -B/usr/local/x86_64-pc-linux-gnu/bin/ -nostdinc++ -fno-PIE -c -g -O2"
        " -DIN_GCC -I. -I../../gcc/gcc -o fold-const.o -MT fold-const.o -MMD -MP -MF ./.deps/fold-const.TPo"
        " ../../gcc/gcc/fold-const.cc": REMOTE,
        "g++ -std=c++11 -c -g -DIN_GCC -o gimple-match.o gimple-match.cc": REMOTE,
        "/obj/./prev-gcc/xg++ -flto=jobserver -frandom-seed=1 -c -o ipa-cp.o ../../gcc/gcc/ipa-cp.cc": REMOTE,
        "/obj/./prev-gcc/xg++ -c -g -O2 -flto=jobserver -o ipa-cp.o ../../gcc/gcc/ipa-cp.cc": REMOTE,
        "build/genattrtab ../../gcc/gcc/common.md ../../gcc/gcc/config/i386/i386.md insn-conditions.md -Atmp-attrtab.cc": REMOTE,
        "/bin/bash ../../gcc/gcc/../move-if-change tmp-attrtab.cc insn-attrtab.cc": REMOTE,
        "/obj/./gcc/xgcc -B/obj/./gcc/ -g -O2 -fPIC -c ../../../gcc/libgcc/libgcc2.c -o _muldi3.o -DL_muldi3": REMOTE,
        "rm -rf libcommon.a; ar rc libcommon.a diagnostic.o pretty-print.o; ranlib libcommon.a": REMOTE,
        "g++ -no-pie -g -DIN_GCC -o cc1 c/c-lang.o attribs.o main.o libbackend.a libcommon.a -lmpc -lmpfr -lgmp": REMOTE,
        "makeinfo --split-size=5000000 -I ../../gcc/gcc/doc -o doc/gcc.info ../../gcc/gcc/doc/gcc.texi": REMOTE,
        "r=`${PWDCMD-pwd}`; export r; s=`cd ../gcc; ${PWDCMD-pwd}`; export s; (cd ./gcc && \\\n termite-make \"DESTDIR=\""
        ' "INSTALL=/usr/bin/install -c" "CFLAGS=-g -O2" all)': RECURSE,
        'termite-make "DESTDIR=" "INSTALL=/usr/bin/install -c" stage1-bubble': MAKE,
        'make "DESTDIR=" "INSTALL_DATA=/usr/bin/install -c -m 644" configure-target-libgcc': MAKE,
        "termite-make stagetrain-bubble": LOCAL,
        ": make; if [ -f stage_last ]; then true; fi; cd .; mv gcc stage1-gcc": LOCAL,
        "[ -d stage2-gcc ] && cd . && mv stage2-gcc gcc; mv stage1-gcc prev-gcc": LOCAL,
        "r=`pwd`; files=`find . -name \"*.o\" -print`; for f in $files; do cmp --ignore-initial=16 stage2-$f stage3-$f; done": LOCAL,
        "test -f Makefile && exit 0; echo Configuring in ./gcc; cd ./gcc; /bin/sh ../../gcc/gcc/configure --srcdir=../../gcc/gcc": LOCAL,
        "cd .. && /bin/sh ./config.status libgcc/Makefile": LOCAL,
        "cd ../build-x86_64-pc-linux-gnu/fixincludes && /bin/sh ./fixinc.sh \"${gcc_dir}/include-fixed\" /usr/include": LOCAL,
        "/obj/./prev-gcc/xg++ -no-pie -g -O2 -flto=jobserver -o cc1 c/c-lang.o main.o libbackend.a": LOCAL,
        "rm -rf libbackend.a; ar rcT libbackend.a gimple-match.o ipa-cp.o": LOCAL,
        "cd testsuite/gcc; runtest --tool gcc execute.exp": LOCAL,
        "termite-make install-gcc": LOCAL,
        'make "DESTDIR=/tmp/x" install': LOCAL,
    },
    "llvm": {
        "/usr/bin/c++ -DGTEST_HAS_RTTI=0 -D_GNU_SOURCE -I/b/lib/Support -I/src/llvm/include -fPIC -O3 -MD -MT x.cpp.o -MF"
        " x.cpp.o.d -o lib/Support/CMakeFiles/LLVMSupport.dir/APInt.cpp.o -c /src/llvm/lib/Support/APInt.cpp": REMOTE,
        ": && /usr/bin/c++ -fPIC -O3 -Wl,-rpath-link,/b/./lib utils/TableGen/CMakeFiles/llvm-tblgen.dir/TableGen.cpp.o"
        " -o bin/llvm-tblgen lib/libLLVMSupport.a -lpthread && :": REMOTE,
        "cd /b && /b/bin/llvm-tblgen -gen-instr-info -I /src/llvm/lib/Target/X86 -I /src/llvm/include X86.td --write-if-changed"
        " -o lib/Target/X86/X86GenInstrInfo.inc -d lib/Target/X86/X86GenInstrInfo.inc.d": REMOTE,
        "cd /b && /usr/bin/cmake -E create_symlink llvm-ar bin/llvm-ranlib": REMOTE,
        ": && /usr/bin/c++ -O3 tools/clang/driver.cpp.o -o bin/clang-19 lib/libclangAST.a && cd /b/tools/clang &&"
        " /usr/bin/cmake -E create_symlink clang-19 bin/clang": REMOTE,
        "cd /b && /usr/bin/python3 /src/llvm/utils/extract_symbols.py -o x.def lib/libLLVMSupport.a": REMOTE,
        "/usr/bin/c++ -O2 -flto=jobserver -o x.o -c x.cpp": REMOTE,
        "clang++ -flto=thin -O2 -o lib/IR/x.o -c /src/llvm/lib/IR/x.cpp": REMOTE,
        "/usr/bin/cmake -E cmake_link_script CMakeFiles/llvm-tblgen.dir/link.txt --verbose=1": REMOTE,
        ": && /usr/bin/cmake -E rm -f lib/libLLVMSupport.a && /usr/bin/ar qc lib/libLLVMSupport.a  a.o b.o &&"
        " /usr/bin/ranlib lib/libLLVMSupport.a && :": LOCAL,
        "cd /b/include/llvm/Support && /usr/bin/cmake -DNAMES=LLVM -DLLVM_SOURCE_DIR=/src/llvm -DHEADER_FILE=V.h -P"
        " /src/llvm/cmake/modules/GenerateVersionFromVCS.cmake": LOCAL,
        "/usr/bin/cmake --regenerate-during-build -S/src/llvm -B/b": LOCAL,
        "cd /b/runtimes/runtimes-bins && /usr/bin/cmake --build .": RECURSE,
        "cd /b/utils/lit && /usr/bin/python3 /b/./bin/llvm-lit -sv /b/utils/lit": LOCAL,
        "cd /b && /usr/bin/cmake -DCOMPONENT=clang -P /b/cmake_install.cmake": LOCAL,
        ": && clang++ -flto=thin -Wl,--thinlto-cache-dir=/b/lto.cache -o bin/opt opt.o && :": LOCAL,
        "/usr/bin/c++ -O2 -flto=jobserver -o bin/opt opt.cpp.o": LOCAL,
        "/usr/bin/python3 /src/clang/utils/perf-training/perf-helper.py merge bin/llvm-profdata x.profdata profiles": LOCAL,
    },
    "cmake": {
        "/usr/bin/c++ -Dl_EXPORTS -I/p/include -O2 -MD -MT CMakeFiles/l.dir/l.cc.o -MF CMakeFiles/l.dir/l.cc.o.d -o"
        " CMakeFiles/l.dir/l.cc.o -c /p/l.cc": REMOTE,
        "cd /b/src && /usr/bin/c++ -O2 -o CMakeFiles/l.dir/l.cc.o -c /p/src/l.cc": REMOTE,
        ": && /usr/bin/cmake -E rm -f libl.a && /usr/bin/ar qc libl.a l.cc.o m.cc.o && /usr/bin/ranlib libl.a && :": REMOTE,
        "cd /b/src && /usr/bin/cmake -E cmake_link_script CMakeFiles/p.dir/link.txt --verbose=": REMOTE,
        "/usr/bin/cmake -P CMakeFiles/l.dir/cmake_clean_target.cmake": REMOTE,
        "cd /b && /usr/bin/cmake -E copy_if_different /p/a.h /b/a.h": REMOTE,
        "cd /b && /usr/bin/cmake -DIN=/p/v.in -DOUT=/b/v.h -P /p/cmake/embed.cmake": REMOTE,
        "/usr/bin/cmake -E touch CMakeFiles/p.dir/depend.stamp": REMOTE,
        "/usr/bin/cmake -E cmake_echo_color --switch= --green --progress-dir=/b/CMakeFiles --progress-num=1"
        " 'Building CXX object CMakeFiles/l.dir/l.cc.o'": QUIET,
        "/usr/bin/cmake -E cmake_progress_start /b/CMakeFiles 4": QUIET,
        "/usr/bin/cmake -E cmake_echo_color --green done; rm -f stamp": REMOTE,
        "/usr/bin/cmake -S/p -B/b --check-build-system CMakeFiles/Makefile.cmake 0": LOCAL,
        'cd /b && /usr/bin/cmake -E cmake_depends "Unix Makefiles" /p /p /b /b /b/CMakeFiles/l.dir/DependInfo.cmake "--color="': LOCAL,
        "cd /b && /usr/bin/cmake -E cmake_autogen /b/CMakeFiles/p_autogen.dir/AutogenInfo.json Release": LOCAL,
        "/usr/bin/cmake --regenerate-during-build -S/p -B/b": LOCAL,
        "termite-make -f CMakeFiles/Makefile2 all": MAKE,
        "termite-make  -f src/CMakeFiles/l.dir/build.make src/CMakeFiles/l.dir/depend": MAKE,
        "cd /b/ext/src/ext-build && termite-make": MAKE,
        "cd /b/ext/src/ext-build && /usr/bin/cmake --build .": RECURSE,
        "cd /b/ext && /usr/bin/cmake -P /b/ext/src/ext-stamp/ext-build-Release.cmake": RECURSE,
        "/usr/bin/ninja -C sub": RECURSE,
        "cd /b && /usr/bin/cmake -P /b/ext/tmp/ext-gitclone.cmake": LOCAL,
        "cd /b && /usr/bin/cmake -Dconfig= -P /b/ext/src/ext-stamp/download-ext.cmake": LOCAL,
        "cd /b/ext-build && /usr/bin/cmake -DCMAKE_BUILD_TYPE=Release -GNinja -S /p/ext -B /b/ext-build": LOCAL,
        "cd /b && /usr/bin/cmake -P cmake_install.cmake": LOCAL,
        "/usr/bin/cmake -P CMakeFiles/l.dir/cmake_clean.cmake": LOCAL,
        "cd /b && /usr/bin/cmake -Dmake= -P /b/ext/src/ext-stamp/ext-configure-Release.cmake": LOCAL,
        "cd /b/ext && CC=gcc ./configure --prefix=/b": LOCAL,
        "/usr/bin/ctest --force-new-ctest-process": LOCAL,
        "/usr/bin/ccmake -S/p -B/b": LOCAL,
        "cd /b && /usr/bin/cpack --config ./CPackConfig.cmake": LOCAL,
    },
    "android": {
        "PWD=/proc/self/cwd prebuilts/clang/host/linux-x86/clang-r416183b/bin/clang++ -c -Iframeworks/base -O2 -MD -MF"
        " out/soong/.intermediates/x.o.d -o out/soong/.intermediates/x.o frameworks/base/libs/x.cpp": REMOTE,
        "prebuilts/gcc/linux-x86/arm/arm-linux-androideabi-4.9/bin/arm-linux-androideabi-g++ -I system/core/include -c -fno-exceptions"
        " -MD -MF out/target/product/generic/obj/x.d -o out/target/product/generic/obj/x.o system/core/x.cpp": REMOTE,
        "rm -f out/x.a && prebuilts/clang/host/linux-x86/bin/llvm-ar crsPD out/x.a @out/x.a.rsp": REMOTE,
        "prebuilts/clang/host/linux-x86/bin/clang++ out/crtbegin.o @out/libutils.so.rsp -o out/libutils.so -flto=thin": REMOTE,
        "out/host/linux-x86/bin/acp -fp out/a.so out/target/product/generic/system/lib/a.so": REMOTE,
        "prebuilts/jdk/jdk11/linux-x86/bin/java -Xmx2g -jar out/host/linux-x86/framework/d8.jar --output out/d out/c.jar": REMOTE,
        "out/soong/host/linux-x86/bin/sbox --sandbox-path out/soong/.temp --manifest out/sbox.textproto": REMOTE,
        "out/host/linux-x86/bin/aidl -Iframeworks/base -dout/x.P frameworks/base/x.aidl out/x.java": REMOTE,
        "/bin/bash -c 'out/host/linux-x86/bin/soong_zip -o out/x.jar -C out/classes -D out/classes'": REMOTE,
        "build/soong/soong_ui.bash --make-mode droid": RECURSE,
        "prebuilts/build-tools/linux-x86/bin/ninja -f out/combined-aosp.ninja -j 20": RECURSE,
        "prebuilts/build-tools/linux-x86/bin/ckati --ninja --ninja_dir=out -f build/make/core/main.mk": LOCAL,
        "out/soong/.bootstrap/bin/soong_build -t -b out/soong -d out/soong/build.ninja.d Android.bp": LOCAL,
        "build/make/tools/findleaves.py --prune=out --prune=.repo . Android.mk": LOCAL,
        "bash build/make/tools/buildinfo.sh > out/target/product/generic/obj/build.prop": LOCAL,
        "build/make/tools/releasetools/build_image.py out/target/product/generic/system out/system_image_info.txt": LOCAL,
        "out/host/linux-x86/bin/mkbootfs -d out/system out/root | out/host/linux-x86/bin/minigzip > out/ramdisk.img": LOCAL,
        "out/host/linux-x86/bin/make_ext4fs -s -T 1 -S file_contexts -l 1G -a system out/system.img out/system": LOCAL,
        "java -jar out/host/linux-x86/framework/signapk.jar build/target/product/security/testkey.x509.pem"
        " build/target/product/security/testkey.pk8 a.apk b.apk": LOCAL,
        "out/host/linux-x86/bin/ota_from_target_files -v out/x-target_files.zip out/x-ota.zip": LOCAL,
        "prebuilts/remoteexecution-client/live/rewrapper --labels=type=compile clang++ -c x.cpp": LOCAL,
        "prebuilts/build-tools/linux-x86/bin/nsjail -H android-build -- /bin/true": LOCAL,
        "adb push out/a.apk /data/local/a.apk": LOCAL,
    },
    "emacs": {
        "gcc -c -Demacs -I. -I../lib -MMD -MF deps/xdisp.d -MP -g3 -O2 xdisp.c": REMOTE,
        "gcc -o temacs -g3 -O2 dispnew.o frame.o xdisp.o ../lib/libgnu.a -lncurses": REMOTE,
        "EMACSLOADPATH= '../src/bootstrap-emacs' -batch --no-site-file --no-site-lisp --eval '(setq load-prefer-newer t)'"
        " -f batch-byte-compile emacs-lisp/cl-lib.el": REMOTE,
        "EMACSLOADPATH= '../src/bootstrap-emacs' -batch --no-site-file -f batch-byte-compile emacs-lisp/loaddefs-gen.el": REMOTE,
        "EMACSLOADPATH= '../src/bootstrap-emacs' -batch -f batch-byte-compile emacs-lisp/ert.el cus-load.el": REMOTE,
        "makeinfo --force --enable-encoding -I ../emacs -o ../../info/emacs.info emacs.texi": REMOTE,
        "../lib-src/make-docfile -d . -g dispnew.o xdisp.o > globals.tmp": REMOTE,
        "ln -f temacs bootstrap-emacs": REMOTE,
        "termite-make -C lib all": MAKE,
        "LC_ALL=C ./temacs -batch  -l loadup --temacs=pbootstrap": LOCAL,
        "setarch -R ./temacs --batch --load loadup dump": LOCAL,
        "EMACSLOADPATH= '../src/bootstrap-emacs' -batch -l ../lisp/emacs-lisp/loaddefs-gen.elc -f loaddefs-generate-batch"
        " ./loaddefs.el . ./calc ./net": LOCAL,
        "EMACSLOADPATH= '../src/emacs' -batch -l cus-dep --eval '(setq x t)' -f custom-make-dependencies ./calc ./net": LOCAL,
        "EMACSLOADPATH= '../src/emacs' -batch -l finder --eval '(setq x t)' -f finder-compile-keywords-make-dist ./calc": LOCAL,
        "HOME=/nonexistent LANG=C EMACS_TEST_DIRECTORY=/e/test timeout 600 '../src/emacs' --batch -l ert -l lisp/x.el"
        " --eval '(ert-run-tests-batch-and-exit nil)'": LOCAL,
        "make install": LOCAL,
        "cd .. && ./config.status src/Makefile": LOCAL,
        "cd .. && /bin/bash ./configure --without-x": LOCAL,
    },
    "guile": {
        "/bin/bash ../libtool  --tag=CC --mode=compile gcc -DHAVE_CONFIG_H -DBUILDING_LIBGUILE=1 -I. -I.. -g -O2 -c -o"
        " libguile_3.0_la-eval.lo `test -f 'eval.c' || echo './'`eval.c": REMOTE,
        "cat alist.doc array-handle.doc | GUILE_AUTO_COMPILE=0 ../meta/build-env guild snarf-check-and-output-texi > g.texi": REMOTE,
        "GUILE_AUTO_COMPILE=0 ../meta/build-env guild compile --target=x86_64-pc-linux-gnu -O1 -o ice-9/eval.go"
        " ../module/ice-9/eval.scm": REMOTE,
        'echo "  BOOTSTRAP(stage0) GUILEC" ice-9/eval.go;\tGUILE_BOOTSTRAP_STAGE=stage0 ../meta/build-env guild compile'
        ' --target="x86_64-pc-linux-gnu" -W0 -O1 -L "/s/module" -o "ice-9/eval.go" "../../s/module/ice-9/eval.scm"': REMOTE,
        "/usr/bin/mkdir -p language/cps; GUILE_AUTO_COMPILE=0 ../meta/build-env guild compile -o language/cps/x.go x.scm": REMOTE,
        "./guile-snarf -o alist.x alist.c -DHAVE_CONFIG_H -I. -I.. -g -O2": REMOTE,
        "/bin/bash ../libtool --tag=CC --mode=link gcc -g -O2 -o guile guile-guile.o libguile-3.0.la": REMOTE,
        "./gen-scmconfig > scmconfig.h.tmp; mv scmconfig.h.tmp scmconfig.h": REMOTE,
        "sed -e 's,@srcdir\\@,/g,' ./build-env.in > build-env; chmod +x build-env": REMOTE,
        "termite-make  all-recursive": MAKE,
        "make check-am": MAKE,
        "/g/check-guile": LOCAL,
        "TESTS= ./check-guile tests/goops.test": LOCAL,
        "echo 3.0.10 > ../source/.version-t && mv ../source/.version-t ../source/.version": LOCAL,
        "help2man -s 1 -N -o doc/guile.1 meta/guile": LOCAL,
        "cd .. && /bin/bash ./config.status --recheck": LOCAL,
        "termite-make install-am": LOCAL,
        "/usr/bin/install -c -m 644 guile.x '/usr/local/share'": LOCAL,
        "/bin/bash ../build-aux/install-sh -c -d /usr/local/lib": LOCAL,
        "/bin/bash ../libtool   --mode=install /usr/bin/install -c   libguile-3.0.la '/usr/local/lib'": LOCAL,
    },
}  # fmt: skip


# LLVM is a CMake project, but has its archives made here.
COMMANDS["llvm"] |= {command: d for command, d in COMMANDS["cmake"].items() if "/ar qc" not in command}

CASES = [(name, command) for name in FILES for command in [*COMMANDS.get(name, {}), *ANYWHERE]]


@pytest.mark.parametrize("name", FILES)
def test_every_file_has_commands_of_both_kinds(name: str) -> None:
    assert name in COMMANDS, "a new file needs commands here"
    assert sum(decision.local for decision in COMMANDS[name].values()) >= 8
    assert sum(not decision.local for decision in COMMANDS[name].values()) >= 8


@pytest.mark.parametrize("name", FILES)
def test_every_rule_says_why_it_is_there(name: str) -> None:
    lines = (PATCHES / f"{name}.termite-localrc").read_text().splitlines()
    rules = [number for number, line in enumerate(lines) if line.startswith("{")]
    assert len(rules) == len(load_rules(os.fsencode(PATCHES / f"{name}.termite-localrc")).rules)
    for number in rules:
        assert re.match(r"// .*\S", lines[number - 1]), lines[number]


@pytest.mark.parametrize(("name", "command"), CASES)
def test_a_command_runs_where_it_should(name: str, command: str) -> None:
    rules = load_rules(os.fsencode(PATCHES / f"{name}.termite-localrc"))
    expected = COMMANDS[name].get(command) or ANYWHERE[command]
    found = rules.decide(command_text(b"", [b"/bin/sh", b"-c", command.encode()]))
    assert (found.local, found.recurse, found.skip_refresh) == (
        expected.local,
        expected.recurse,
        expected.skip_refresh,
    ), found.rule


@pytest.mark.parametrize("name", FILES)
def test_every_rule_but_the_last_decides_one_of_the_commands(name: str) -> None:
    rules = load_rules(os.fsencode(PATCHES / f"{name}.termite-localrc"))
    used = {rules.decide(command.encode()).rule for command in [*COMMANDS[name], *ANYWHERE]}
    unused = [rule.decision.rule for rule in rules.rules if rule.decision.rule not in used]
    assert not unused
