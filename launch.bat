@echo off
rem One-command start on Windows; launch.sh does the same on Linux. "launch.bat help" lists the commands.
setlocal EnableExtensions DisableDelayedExpansion
set "PYTHONHOME="
set "PYTHONPATH="
set "PYTHONUTF8=1"
set "ROOT=%~dp0"
set "ROOT=%ROOT:~0,-1%"
set "VENV=%ROOT%\.venv"
set "VPY=%VENV%\Scripts\python.exe"

rem What follows the command, with its quotes, for sync, demo and test. No block and no "call" may see it:
rem both would change special characters in file names.
set REST=%*
set "COMMAND=%~1"
rem Whether an option asks for several GPUs, or for a face restorer, which take packages of their own.
set "CLUSTER="
set "RESTORE="
:next_argument
if [%1]==[] goto dispatch
if "%~1"=="--" goto dispatch
if "%~1"=="--gpus" set "CLUSTER=1"
if "%~1"=="--cluster" set "CLUSTER=1"
if "%~1"=="--restore" set "RESTORE=1"
shift /1
goto next_argument
:dispatch
if not defined COMMAND goto app
if "%COMMAND:~0,1%"=="-" goto app_or_help
if /i "%COMMAND%"=="help" goto help
if /i "%COMMAND%"=="sync" goto sync
if /i "%COMMAND%"=="demo" goto demo
if /i "%COMMAND%"=="test" goto test
echo Unknown command: "%COMMAND%" (launch.bat help lists the commands).>&2
exit /b 2

:help
echo launch.bat                           open the web page (options such as --share are passed on)
echo launch.bat demo                      lip-sync the bundled example to outputs\demo.mp4
echo launch.bat sync VIDEO AUDIO -o OUT   lip-sync two files; all options: launch.bat sync --help
echo launch.bat test                      check the code: ruff, mypy and pytest (options are passed on to pytest)
echo launch.bat help                      show this text
echo.
echo The first start creates the folder .venv beside this script and installs the packages into it.
echo Set PYTHON to the full path of a python.exe (3.10 to 3.13) to name the one to create it with.
echo Set LATENTSYNC_TORCH to a build of torch (default, cu126, cu130) to install that one, else the GPU decides.
exit /b 0

:app_or_help
if "%COMMAND%"=="-h" goto help
if "%COMMAND%"=="--help" goto help
:app
call :install
if errorlevel 1 goto stop
call :install_cluster
if errorlevel 1 goto stop
call :install_restore
if errorlevel 1 goto stop
"%VPY%" "%ROOT%\app.py" %REST%
if not errorlevel 1 exit /b 0
rem Without an argument the script was probably started by a double click: keep the window open.
if not defined COMMAND pause
exit /b 2

:sync
set REST=%REST:*sync=%
call :install
if errorlevel 1 goto stop
call :install_cluster
if errorlevel 1 goto stop
call :install_restore
if errorlevel 1 goto stop
"%VENV%\Scripts\latentsync.exe" sync %REST%
exit /b %ERRORLEVEL%

:demo
set REST=%REST:*demo=%
call :install
if errorlevel 1 goto stop
call :install_cluster
if errorlevel 1 goto stop
call :install_restore
if errorlevel 1 goto stop
if not exist "%ROOT%\outputs" mkdir "%ROOT%\outputs"
"%VENV%\Scripts\latentsync.exe" sync "%ROOT%\assets\example\face.mp4" "%ROOT%\assets\example\speech.wav" -o "%ROOT%\outputs\demo.mp4" --model demo %REST%
if not "%ERRORLEVEL%"=="0" exit /b %ERRORLEVEL%
echo The lip-synced example is "%ROOT%\outputs\demo.mp4"
exit /b 0

:test
set REST=%REST:*test=%
call :install
if errorlevel 1 goto stop
fc /b "%ROOT%\tests\requirements.txt" "%VENV%\installed-tests" >nul 2>nul && goto test_start
echo Installing the packages of tests\requirements.txt into .venv ...
"%VPY%" -m pip install --quiet --no-input --disable-pip-version-check -r "%ROOT%\tests\requirements.txt"
if errorlevel 1 goto install_failed
copy /y "%ROOT%\tests\requirements.txt" "%VENV%\installed-tests" >nul
:test_start
cd /d "%ROOT%"
"%VPY%" -m ruff check . || exit /b 1
"%VPY%" -m ruff format --check . || exit /b 1
"%VPY%" -m mypy
if not "%ERRORLEVEL%"=="0" exit /b %ERRORLEVEL%
rem Two runs: Triton settles at its import whether it interprets, so the kernels have a run of their own. Options go to
rem both; a run that has none of the tests that they select (exit code 5) is no failure unless both have none.
"%VPY%" -m pytest -n logical --maxprocesses 4 --dist loadfile %REST%
set "FIRST=%ERRORLEVEL%"
echo.
echo The fused kernels, in Triton's interpreter:
set "TRITON_INTERPRET=1"
"%VPY%" -m pytest -n logical --maxprocesses 4 %REST%
set "SECOND=%ERRORLEVEL%"
echo Tests: exit code %FIRST%; kernels: exit code %SECOND%.
if "%FIRST%%SECOND%"=="05" exit /b 0
if "%FIRST%"=="0" exit /b %SECOND%
if not "%FIRST%"=="5" exit /b %FIRST%
exit /b %SECOND%

:stop
if not defined COMMAND pause
exit /b 2


rem Makes .venv hold what requirements.exact.txt asks for. .venv\installed records what was installed, and is written
rem last: after an interruption it is missing and the next start installs again.
:install
if not exist "%VPY%" goto create
"%VPY%" -c "import pip" >nul 2>nul || goto create
goto compare

:create
call :find_python
if not defined BASE goto no_python
echo Creating .venv ...
%BASE% -m venv --clear "%VENV%"
if not errorlevel 1 goto compare
echo Could not create "%VENV%" (the reason is above).>&2
exit /b 2

:compare
rem Prints which build of torch suits this machine, the one that is installed (or "none"), and the reason.
"%VPY%" -I "%ROOT%\optim\torch_build.py" >"%VENV%\build"
if errorlevel 1 exit /b 2
for /f "usebackq tokens=1,2,* delims= " %%a in ("%VENV%\build") do (
    set "BUILD=%%a"
    set "PRESENT=%%b"
    set "REASON=%%c"
)
"%VPY%" -c "import sys; print(sys.version_info[:2])" >"%VENV%\wanted"
>>"%VENV%\wanted" echo torch: %BUILD%
>>"%VENV%\wanted" echo project: "%ROOT%"
>>"%VENV%\wanted" type "%ROOT%\requirements.exact.txt"
fc /b "%VENV%\wanted" "%VENV%\installed" >nul 2>nul && exit /b 0
del "%VENV%\installed" "%VENV%\installed-restore" >nul 2>nul
echo Installing the packages of requirements.exact.txt into .venv (only needed once) ...
echo torch: the %BUILD% build, as %REASON%.
rem Builds differ in their local version alone, which "torch==2.13.0" does not look at.
if "%PRESENT%"=="none" goto torch
if "%PRESENT%"=="%BUILD%" goto torch
"%VPY%" -m pip uninstall --quiet --yes --disable-pip-version-check torch
if errorlevel 1 goto install_failed
:torch
rem The default build comes with the other packages, from the configured index. Only pytorch.org has the others: it is
rem asked for torch alone, besides the configured index.
if "%BUILD%"=="default" goto packages
for /f "tokens=2 delims==" %%v in ('findstr /b "torch==" "%ROOT%\requirements.exact.txt"') do set "TORCH=%%v"
"%VPY%" -m pip install --no-input --disable-pip-version-check --no-deps --extra-index-url https://download.pytorch.org/whl/%BUILD% "torch==%TORCH%+%BUILD%"
if errorlevel 1 echo torch's %BUILD% build cannot be had (the reason is above): the default build is installed instead, which may not use the GPU.>&2
:packages
rem First the pinned packages, by their hashes; pip wants hashes of either all packages or none, so what those need
rem follows in a call of its own.
"%VPY%" -m pip install --quiet --no-input --disable-pip-version-check --no-deps --require-hashes -r "%ROOT%\requirements.hashes.txt"
if errorlevel 1 goto install_failed
"%VPY%" -m pip install --quiet --no-input --disable-pip-version-check -r "%ROOT%\requirements.exact.txt"
if errorlevel 1 goto install_failed
rem The command "latentsync", which runs the code in this folder.
"%VPY%" -m pip install -qq --no-input --disable-pip-version-check --no-deps -e "%ROOT%"
if errorlevel 1 goto install_failed
copy /y "%VENV%\wanted" "%VENV%\installed" >nul
exit /b 0

rem Several GPUs take packages that one does not: installed when an option first asks for them.
:install_cluster
if not defined CLUSTER exit /b 0
fc /b "%ROOT%\requirements.cluster.txt" "%VENV%\installed-cluster" >nul 2>nul && exit /b 0
echo Installing the packages of requirements.cluster.txt into .venv (only needed once) ...
"%VPY%" -m pip install --quiet --no-input --disable-pip-version-check -r "%ROOT%\requirements.cluster.txt"
if errorlevel 1 goto install_failed
copy /y "%ROOT%\requirements.cluster.txt" "%VENV%\installed-cluster" >nul
exit /b 0

:install_failed
echo Installing the packages failed (the reason is above): check the network and the free disk space, then start again.>&2
exit /b 2

:no_python
if defined PYTHON echo PYTHON=%PYTHON% is not a 64-bit Python 3.10 to 3.13: name another one, or unset PYTHON.>&2
if not defined PYTHON echo No 64-bit Python 3.10 to 3.13 was found: install one from https://www.python.org/downloads/windows/ and start again.>&2
exit /b 2


rem Face restorers take packages of their own: installed when --restore first asks for them.
:install_restore
if not defined RESTORE exit /b 0
fc /b "%ROOT%\requirements.restore.txt" "%VENV%\installed-restore" >nul 2>nul && exit /b 0
echo Installing the packages of requirements.restore.txt into .venv (only needed once) ...
if "%BUILD%"=="default" goto restore_packages
for /f "tokens=2 delims==" %%v in ('findstr /b "torchvision==" "%ROOT%\requirements.restore.txt"') do set "VISION=%%v"
"%VPY%" -m pip install --no-input --disable-pip-version-check --no-deps --extra-index-url https://download.pytorch.org/whl/%BUILD% "torchvision==%VISION%+%BUILD%"
if errorlevel 1 echo torchvision's %BUILD% build cannot be had (the reason is above): the default build is installed instead, which may not fit.>&2
:restore_packages
"%VPY%" -m pip install --quiet --no-input --disable-pip-version-check -r "%ROOT%\requirements.restore.txt"
if errorlevel 1 goto install_failed
copy /y "%ROOT%\requirements.restore.txt" "%VENV%\installed-restore" >nul
exit /b 0


rem BASE: the first Python that is recent enough and able to create a virtual environment.
:find_python
set "BASE="
if not defined PYTHON goto search
set "PYTHON=%PYTHON:"=%"
call :try "%PYTHON%"
exit /b 0
:search
call :try py -3.13
call :try py -3.12
call :try py -3.11
call :try py -3.10
call :try python3
call :try python
exit /b 0

:try
if defined BASE exit /b 0
%* -c "import sys, venv, ensurepip; sys.exit(not ((3, 10) <= sys.version_info[:2] <= (3, 13) and sys.maxsize > 2**32))" >nul 2>nul && set BASE=%*
exit /b 0

